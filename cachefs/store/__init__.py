"""Where the objects live: the store port, its implementations, and the one retry policy around them."""

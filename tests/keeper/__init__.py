"""The keeper and the node service on real mounts: everything may die, and no reader notices."""

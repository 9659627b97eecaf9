"""The node's agent: the only writer of the cache, and the client by which workers reach it."""

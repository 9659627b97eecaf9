"""The keeper of all mounts of a node, and the node service that runs their workers."""

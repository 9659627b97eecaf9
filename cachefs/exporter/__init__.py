"""What this node has counted, for Prometheus."""

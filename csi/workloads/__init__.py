"""What is done to files with Kubernetes workloads: a sidecar put into them, nodes preferred that hold their dataset."""

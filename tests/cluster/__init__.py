"""A cluster on one machine: nodes in network namespaces, with real mounts, a real etcd and a real S3 server."""

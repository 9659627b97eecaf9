"""The messages and services of etcd, generated from its proto files by `scripts/etcd-stubs`. Never edited by hand."""

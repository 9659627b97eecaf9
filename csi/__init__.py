"""The CSI plugin for Kubernetes. Reserved; empty in this version."""

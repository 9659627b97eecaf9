"""Image, chart, manifests, examples and tuning: what is rendered is what Kubernetes and the command line accept."""

"""The operator: turns an AdaptiveSpeculator into Kubernetes objects and calls to its registry."""

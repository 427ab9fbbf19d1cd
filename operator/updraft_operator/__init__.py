"""The operator: what an AdaptiveSpeculator says becomes objects of Kubernetes and wishes of the registry."""

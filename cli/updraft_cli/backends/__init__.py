"""The two places where drafts are looked after: a registry (gRPC), and the API server of a cluster."""

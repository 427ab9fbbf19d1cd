"""The gRPC services of the registry."""

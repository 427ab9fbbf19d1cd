"""Code at the edges of every process: settings, logs, metrics, gRPC, streams, lifecycle. No torch."""

"""What every process does at its edges: settings, logs, metrics, gRPC, streams, lifecycle. No torch."""

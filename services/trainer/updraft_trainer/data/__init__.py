"""From traces to samples: intake, durable replay, selection."""

"""The OpenAI-compatible HTTP server: routes, request checks, limits and streamed answers."""

"""Text to tokens and back: chat templates, tokenization, log-probabilities."""

"""Callers that Kubernetes vouches for: tokens of ServiceAccounts, and the keys that sign them."""

"""Callers with a Kubernetes identity: tokens of ServiceAccounts, and the keys that verify them."""

"""Upgrades of the operator, and the pods that follow."""

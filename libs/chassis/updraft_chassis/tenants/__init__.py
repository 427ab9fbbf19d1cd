"""Tenants: whose requests are, in a form that names nobody."""

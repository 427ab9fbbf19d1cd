"""`updraft attach` for a server of your own, and `kubectl updraft attach` for a workload in a cluster."""

"""TLS inside the cluster: what certificates are for, when they are renewed, and the objects that hold them."""

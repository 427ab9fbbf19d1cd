"""Every test of this folder may ask for a cluster."""

from tests.cluster.fixtures import api, kubernetes, namespace, node

__all__ = ["api", "kubernetes", "namespace", "node"]

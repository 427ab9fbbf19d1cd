"""Amounts as Kubernetes writes them."""

from kubernetes.utils.quantity import parse_quantity


def mebibytes(quantity: str) -> int:
    """Whole mebibytes, at least one."""
    return max(1, int(parse_quantity(quantity)) // (1024 * 1024))

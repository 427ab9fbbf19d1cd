"""The domains that get counters of their own: the names that most requests carry. Pure.

Callers choose names, so a pod cannot count every one. It keeps up to MAX_DOMAINS by the rule of Misra and Gries (1982): with a
full table, a request of another name takes one from the weight of each name in it, and a name without weight leaves. So a
name that more than one of MAX_DOMAINS + 1 requests carry is in the table, however many others come, and a name that nobody
uses any more gives way.
"""

from collections.abc import Mapping

MAX_DOMAINS = 16

OTHER = "other"
"""Where requests count whose domain is not in the table. A domain of this name is among them."""

MAX_CHARS = 64

MAX_WEIGHT = 1000
"""So that a domain that has been large for months gives way within a thousand requests of other names."""


def admit(weights: Mapping[str, int], domain: str) -> dict[str, int]:
    """The table after one more request of a domain, which is in the table or counts as OTHER."""
    if domain in weights or len(weights) < MAX_DOMAINS:
        return {**weights, domain: min(MAX_WEIGHT, weights.get(domain, 0) + 1)}
    return {name: weight - 1 for name, weight in weights.items() if weight > 1}


def label(domain: str) -> str:
    """The name in one printable line, because terminals and dashboards show it."""
    return "".join(char if char.isprintable() else "?" for char in domain[:MAX_CHARS]).strip()

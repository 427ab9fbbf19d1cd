"""Distributes the captured tokens per second that a trainer can use over the pods of its speculator. Pure."""

import math
from collections.abc import Mapping

FLOOR = 100.0
"""Tokens per second of a speculator whose trainer can use none or is away, so that evidence does not stop."""

EVEN_SHARE = 0.1
"""Part of the demand that is shared evenly, because a pod with little traffic so far may get more at any time."""

HORIZON_S = 30.0
"""Reports older than this count little in a pod's traffic. A long request counts all at once, when it ends."""


def distribute(demand: float, traffic: Mapping[str, float]) -> dict[str, float]:
    """The grant of each pod; together they are the demand, or the floor. `traffic` is in tokens per second.

    A pod's share is in proportion to its traffic, but for the part that is shared evenly.
    """
    demand = max(demand, FLOOR)
    total = math.fsum(traffic.values())
    return {
        pod: demand * (EVEN_SHARE / len(traffic) + (1.0 - EVEN_SHARE) * (rate / total if total else 1.0 / len(traffic)))
        for pod, rate in traffic.items()
    }


def averaged(rate: float, tokens: int, seconds: float) -> float:
    """The traffic, in tokens per second, after `seconds` in which `tokens` were counted: an average that forgets."""
    return rate * math.exp(-max(0.0, seconds) / HORIZON_S) + tokens / HORIZON_S

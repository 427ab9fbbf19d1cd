"""Weights that undo that pods capture some requests likelier than others. Pure.

A request that was taken with probability p stands for 1 / p requests (Horvitz and Thompson 1952). Weights are bounded, because
few of them would otherwise decide alone, and normalised, because a step is as long for requests that are all unlikely.
"""

import math
from collections.abc import Sequence

MAX_RATIO = 4.0
"""Largest weight over the smallest: what the bias of a pod's choice makes of it. Samples of times with more credits and with
fewer differ by more, but no time is worth more than another."""


def weights(probabilities: Sequence[float]) -> list[float]:
    """One weight a request, in (0, MAX_RATIO], with the mean 1."""
    if not probabilities:
        return []
    logs = [-math.log(probability) for probability in probabilities]
    middle, half = math.fsum(logs) / len(logs), math.log(MAX_RATIO) / 2
    bounded = [math.exp(min(half, max(-half, log - middle))) for log in logs]
    mean = math.fsum(bounded) / len(bounded)
    return [weight / mean for weight in bounded]

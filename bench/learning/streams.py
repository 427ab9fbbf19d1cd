"""The traffic of a run: which kinds come in which order, and what serves before the first request."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.learning.kinds import TUNED


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """`order` names the kind of each request. With `static_without` a draft serves from the start that has converged on all
    kinds but that one; otherwise nothing serves."""

    name: str
    order: tuple[str, ...]
    static_without: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are measured: those of the traffic, and those that the first draft knows."""
        known = [kind for kind in TUNED if self.static_without and kind != self.static_without]
        return tuple(dict.fromkeys([*self.order, *known]))


def scratch(kind: str, length: int) -> Stream:
    """One kind, and no draft."""
    return Stream(name=f"scratch-{kind}", order=(kind,) * length)


def shift(kind: str, length: int) -> Stream:
    """One kind, after a draft that knows all the others."""
    return Stream(name=f"shift-{kind}", order=(kind,) * length, static_without=kind)


def ordered(kinds: Sequence[str], length: int) -> Stream:
    """One kind after another, and back to the first."""
    parts = [*kinds, kinds[0]]
    return Stream(name="ordered", order=tuple(kind for kind in parts for _ in range(length // len(parts))))


def drift(kinds: Sequence[str], length: int, seed: int) -> Stream:
    """All kinds mixed; each is likeliest once, and its share rises and falls slowly."""
    rng, order = random.Random(seed), []
    for n in range(length):
        at = n / max(1, length - 1) * (len(kinds) - 1)
        weights = [max(0.1, 1.0 - abs(at - place)) for place in range(len(kinds))]
        order.extend(rng.choices(kinds, weights))
    return Stream(name="drift", order=tuple(order))

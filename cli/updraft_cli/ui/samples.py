"""Figures over time, kept in memory for the charts, because no backend keeps them.

Bounded: when a series is full, every second point of its older half is dropped, so that it always reaches back to the start
of the console, and is finest near its end.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_POINTS = 2000
MAX_SWAPS = 200

WINDOW_S = 60.0
MIN_STEPS = 10
"""Verify steps in the window below which a ratio is noise."""

Counters = Mapping[int, tuple[int, int]]
"""Tokens and verify steps by version, since the start of the pods."""


@dataclass(slots=True)
class Recent:
    """Acceptance length over the last minute, from sums over the pods: a mean since the start hides what changes.

    The sums grow as long as the same pods run. When a pod comes, leaves or restarts, they jump by all that it has counted, so
    the minute begins again.
    """

    window_s: float = WINDOW_S
    _seen: deque[tuple[float, Counters]] = field(default_factory=deque)
    _num_pods: int = 0

    def add(self, at_s: float, counters: Counters, num_pods: int = 0) -> dict[int, float]:
        """Return tokens per verify step by version; a version without enough traffic since the pods changed is absent."""
        if num_pods != self._num_pods or (self._seen and _is_less(counters, self._seen[-1][1])):
            self._seen.clear()
            self._num_pods = num_pods
        while len(self._seen) > 1 and self._seen[1][0] <= at_s - self.window_s:
            self._seen.popleft()
        before = self._seen[0][1] if self._seen else counters
        self._seen.append((at_s, counters))
        lengths = {}
        for version, (tokens, steps) in counters.items():
            tokens_before, steps_before = before.get(version, (0, 0))
            if steps - steps_before >= MIN_STEPS and tokens - tokens_before >= steps - steps_before:
                lengths[version] = (tokens - tokens_before) / (steps - steps_before)
        return lengths


def _is_less(counters: Counters, before: Counters) -> bool:
    """Whether a sum has fallen."""
    return any(
        now < known
        for version, sums in counters.items()
        for now, known in zip(sums, before.get(version, (0, 0)), strict=True)
    )


@dataclass(slots=True)
class Swap:
    """Pods that began to hold another version, one shortly after the other."""

    at_s: float
    """When the first of them was seen to hold it, Unix seconds."""
    version: int
    """0: no draft."""
    num_pods: int


@dataclass(slots=True)
class Swaps:
    """Changes of the versions that pods hold."""

    seen: deque[Swap] = field(default_factory=lambda: deque(maxlen=MAX_SWAPS))
    """The oldest first."""
    _held: Mapping[str, int] = field(default_factory=dict)

    def add(self, at_s: float, held: Mapping[str, int]) -> None:
        """Note which version each pod holds now. A pod that was not there before has not swapped."""
        changed = Counter(version for pod, version in held.items() if self._held.get(pod, version) != version)
        self._held = held
        for version, num_pods in changed.items():
            for swap in self.seen:
                if swap.version == version and at_s - swap.at_s <= WINDOW_S:
                    swap.num_pods += num_pods
                    break
            else:
                self.seen.append(Swap(at_s=at_s, version=version, num_pods=num_pods))


@dataclass(slots=True)
class Samples:
    """Points of one speculator: at a time, a number for each name; a name may be absent."""

    max_points: int = MAX_POINTS
    swaps: Swaps = field(default_factory=Swaps)
    _points: list[tuple[float, Mapping[str, float]]] = field(default_factory=list)

    def add(self, at_s: float, figures: Mapping[str, float]) -> None:
        """Keep a point, unless it is not newer than the last one."""
        if self._points and at_s <= self._points[-1][0]:
            return
        self._points.append((at_s, figures))
        if len(self._points) > self.max_points:
            older = len(self._points) // 2
            self._points = [*self._points[:older:2], *self._points[older:]]

    def __len__(self) -> int:
        return len(self._points)

    def since(self, since_s: float, names: Sequence[str]) -> tuple[list[float], list[list[float | None]]]:
        """Return the times after `since_s` (Unix seconds), and for each name its numbers; None where it was absent."""
        points = [point for point in self._points if point[0] > since_s]
        return [at_s for at_s, _ in points], [[figures.get(name) for _, figures in points] for name in names]

    def names(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`, in order of their first appearance."""
        return list(dict.fromkeys(name for _, figures in self._points for name in figures if name.startswith(prefix)))

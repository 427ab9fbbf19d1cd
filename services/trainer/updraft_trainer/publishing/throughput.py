"""Tokens per second and shares of time over the last minute of training, or over the last step if that took longer.

One thread adds, and any thread reads: work lies in immutable slices that are replaced as one tuple.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from updraft_trainer.learning.step_time import Phase

WINDOW_S = 60.0
_SLICE_S = 5.0
"""Work is summed up in slices of at least this length, so that a window of short steps has few parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Work between two moments in seconds. `step_s`: the part that optimizer steps took; `flops`: their floating-point
    operations; `tokens`: tokens that they trained on."""

    start_s: float
    end_s: float
    seconds: Mapping[Phase, float]
    tokens: int = 0
    flops: float = 0.0
    step_s: float = 0.0

    def __add__(self, later: "Work") -> "Work":
        phases = self.seconds.keys() | later.seconds.keys()
        return Work(
            start_s=self.start_s,
            end_s=later.end_s,
            seconds={phase: self.seconds.get(phase, 0.0) + later.seconds.get(phase, 0.0) for phase in phases},
            tokens=self.tokens + later.tokens,
            flops=self.flops + later.flops,
            step_s=self.step_s + later.step_s,
        )


@dataclass(slots=True)
class Throughput:
    """The newest work, as much as lies within the window."""

    device: str = ""
    """Its name, as people read it."""
    world_size: int = 1
    """Processes that train together."""
    peak_flops: float | None = None
    """Operations per second that the device can do at most; None if it is not known, or a CPU."""
    _slices: tuple[Work, ...] = field(default=(), init=False)

    def add(self, work: Work) -> None:
        """Add work that began when the last one ended, or later."""
        slices = self._slices
        if slices and work.end_s - slices[-1].start_s <= _SLICE_S:
            slices = (*slices[:-1], slices[-1] + work)
        else:
            slices = (*slices, work)
        # What follows the oldest slice must span the window without it, or it is still needed.
        while len(slices) > 1 and work.end_s - slices[1].start_s >= WINDOW_S:
            slices = slices[1:]
        self._slices = slices

    @property
    def total(self) -> Work | None:
        """All work of the window; None before there is any."""
        slices = self._slices
        if not slices:
            return None
        whole = slices[0]
        for one in slices[1:]:
            whole += one
        return whole

    @property
    def tokens_per_s(self) -> float:
        total = self.total
        return total.tokens / _span(total) if total else 0.0

    @property
    def flops_utilization(self) -> float | None:
        """Model FLOPs utilization of optimizer steps: estimates and pauses do not count. None without a peak or a step."""
        total = self.total
        if self.peak_flops is None or total is None or not total.step_s:
            return None
        return total.flops / total.step_s / self.peak_flops

    @property
    def shares(self) -> dict[Phase, float]:
        """The share of the time by phase, the largest first. What is missing to 1 passed between phases."""
        total = self.total
        if total is None:
            return {}
        shares = ((phase, seconds / _span(total)) for phase, seconds in total.seconds.items() if seconds > 0)
        return dict(sorted(shares, key=lambda one: -one[1]))


def _span(work: Work) -> float:
    """At least as long as its phases, which other clocks may have measured."""
    return max(1e-9, work.end_s - work.start_s, sum(work.seconds.values()))

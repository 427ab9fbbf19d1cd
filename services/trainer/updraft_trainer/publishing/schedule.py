"""When to estimate, to save and to publish: questions about counts and times, without effects."""

from dataclasses import dataclass

MAX_BACKOFF_S = 600.0
"""A registry that keeps refusing is asked every ten minutes: often enough to notice that it changed its mind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSchedule:
    """Optimizer steps and seconds between estimates, seconds between saves."""

    evaluate_steps: int
    evaluate_seconds: float
    checkpoint_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where training stood at a moment: optimizer steps, held-out samples ever seen, monotonic seconds."""

    step: int
    num_held_out: int
    at_s: float


def is_estimate_due(now: Progress, last: Progress, pace: TrainingSchedule) -> bool:
    """After enough steps; or after a while, if the weights or the evidence changed."""
    has_changed = now.step > last.step or now.num_held_out > last.num_held_out
    is_late = now.at_s - last.at_s >= pace.evaluate_seconds
    return now.step - last.step >= pace.evaluate_steps or (has_changed and is_late)


class PublishBackoff:
    """Doubles the time between publications while they are refused; `first_s` at first, MAX_HOLDOFF_S at most."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._wait_s = 0.0
        self._until_s = float("-inf")

    def is_over(self, now_s: float) -> bool:
        """Whether the next publication may be tried."""
        return now_s >= self._until_s

    def refused(self, now_s: float) -> float:
        """Note a refusal; return the seconds to wait."""
        self._wait_s = min(MAX_BACKOFF_S, max(self._first_s, 2 * self._wait_s))
        self._until_s = now_s + self._wait_s
        return self._wait_s

    def reset(self) -> None:
        """Note a success, or that what serves has changed: the next candidate is judged anew."""
        self._wait_s = 0.0
        self._until_s = float("-inf")

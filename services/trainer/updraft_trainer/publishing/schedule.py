"""When to estimate, save and publish. These are pure functions of counts and times."""

from collections.abc import Mapping
from dataclasses import dataclass

TIMES_AN_ESTIMATE = 4.0
"""Time between the starts of estimates that are early, over the time of one. So these take at most a quarter of the time, also
those of a wide draft without a GPU, where one takes minutes and an optimizer step too."""

MAX_BACKOFF_S = 600.0
"""Longest pause between publications while the registry rejects them: short enough to notice when that changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSchedule:
    """Optimizer steps and seconds between estimates, and seconds between saves."""

    evaluate_steps: int
    evaluate_seconds: float
    checkpoint_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of training at one moment: optimizer steps, held-out requests admitted so far, monotonic seconds."""

    step: int
    num_held_out: int
    at_s: float


def is_estimate_due(
    now: Progress, last: Progress | None, schedule: TrainingSchedule, *, duration_s: float = 0.0
) -> bool:
    """True after enough steps, or after enough time if the weights or the held-out requests have changed.

    `last` is when the last estimate began, which took `duration_s`; without one it is due.
    """
    if last is None:
        return True
    has_changed = now.step > last.step or now.num_held_out > last.num_held_out
    steps, seconds = next_estimate(now, last, schedule, duration_s=duration_s)
    return not steps or (has_changed and not seconds)


def next_estimate(
    now: Progress, last: Progress | None, schedule: TrainingSchedule, *, duration_s: float = 0.0
) -> tuple[int, float]:
    """Optimizer steps until one is due, and seconds until one is due if anything has changed; neither is negative."""
    if last is None:
        return 0, 0.0
    wait_s = max(schedule.evaluate_seconds, TIMES_AN_ESTIMATE * duration_s)
    return max(0, schedule.evaluate_steps - (now.step - last.step)), max(0.0, wait_s - (now.at_s - last.at_s))


def is_save_due(now: Progress, saved: Progress, schedule: TrainingSchedule, *, duration_s: float) -> bool:
    """True if a save has to start now for a kill to cost no more time than it may, because the next chance would be too late.

    `saved` is when the state of the last save was taken. `duration_s`: from now until a save would be durable that starts after
    the next step.
    """
    return now.step != saved.step and now.at_s - saved.at_s >= schedule.checkpoint_seconds - duration_s


def sizes_over_ranks(sizes: Mapping[str, int], num_elsewhere: int) -> dict[str, float]:
    """Estimate the sizes of clusters over all ranks. `sizes` are those of this rank; the others store `num_elsewhere` requests.

    A hash spreads traces over ranks, so each cluster is assumed to have the same share of requests at every rank.
    """
    num_own = sum(sizes.values())
    if not num_own:
        return {"": float(num_elsewhere)}
    return {cluster: size * (num_own + num_elsewhere) / num_own for cluster, size in sizes.items()}


def is_fit_due(sizes: Mapping[str, float], fitted: Mapping[str, float], *, first: int) -> bool:
    """True if all traffic or a cluster of it has `first` requests, and at the last fit had fewer, or half as many."""
    now_and_then = [(size, fitted.get(cluster, 0)) for cluster, size in sizes.items()]
    now_and_then.append((sum(sizes.values()), sum(fitted.values())))
    return any(now >= first and (then < first or now >= 2 * then) for now, then in now_and_then)


def num_newest_judges(num_training: int, num_judges: int) -> int:
    """How many of the newest of `num_training` requests judge a closed form beside the held-out ones: at most `num_judges`, and
    so few that at least `num_judges` others are left to fit."""
    return max(0, min(num_judges, num_training - num_judges))


class PublishBackoff:
    """Doubles the pause between publications while they are rejected, from `first_s` up to MAX_BACKOFF_S."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._wait_s = 0.0
        self._until_s = float("-inf")

    def is_over(self, now_s: float) -> bool:
        return now_s >= self._until_s

    def rejected(self, now_s: float) -> float:
        """Record a rejection; return the seconds to wait."""
        self._wait_s = min(MAX_BACKOFF_S, max(self._first_s, 2 * self._wait_s))
        self._until_s = now_s + self._wait_s
        return self._wait_s

    def reset(self) -> None:
        """After a success, or when another version serves: the next candidate is compared with a new baseline."""
        self._wait_s = 0.0
        self._until_s = float("-inf")

"""Moments as the API writes them, to the second."""

from collections.abc import Iterable
from datetime import UTC, datetime

from updraft_operator.api.status import Condition
from updraft_operator.planning.conditions import UndatedCondition


def moment(unix_s: float) -> datetime:
    """A time in seconds since 1970."""
    return datetime.fromtimestamp(int(unix_s), UTC)


def moment_ms(unix_ms: int) -> datetime | None:
    """A time of the registry's; None for 0, which is no time."""
    return moment(unix_ms / 1000) if unix_ms else None


def dated(
    undated: Iterable[UndatedCondition], before: Iterable[Condition], generation: int, now: datetime
) -> list[Condition]:
    """Conditions of verdicts; the time of one changes with its status only, as Kubernetes has it."""
    old = {condition.type: condition for condition in before}
    return [_dated(verdict, old.get(verdict.type), generation, now) for verdict in undated]


def _dated(verdict: UndatedCondition, before: Condition | None, generation: int, now: datetime) -> Condition:
    is_same = before is not None and before.status == verdict.status
    return Condition(
        type=verdict.type,
        status=verdict.status,
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before is not None and is_same else now,
        reason=verdict.reason,
        message=verdict.message,
    )

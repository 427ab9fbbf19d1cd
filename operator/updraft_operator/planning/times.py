"""Times as the API writes them, to the second."""

from collections.abc import Iterable
from datetime import UTC, datetime

from updraft_operator.api.status import Condition
from updraft_operator.planning.conditions import UndatedCondition


def moment(unix_s: float) -> datetime:

    return datetime.fromtimestamp(int(unix_s), UTC)


def moment_ms(unix_ms: int) -> datetime | None:
    """A time from the registry; None for 0, which means no time."""
    return moment(unix_ms / 1000) if unix_ms else None


def dated(
    undated: Iterable[UndatedCondition], before: Iterable[Condition], generation: int, now: datetime
) -> list[Condition]:
    """Add generation and transition time. The time changes only with the status, as everywhere in Kubernetes."""
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

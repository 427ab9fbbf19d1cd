"""One condition of a resource as it is decided, and as it is written."""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, NamedTuple

from updraft_operator.api.status import Condition


class Assessment(NamedTuple):
    """A condition without its type, generation and transition time."""

    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


def dated(
    assessments: Mapping[str, Assessment], before: list[Condition], generation: int, now: datetime
) -> list[Condition]:
    """Add generation and transition time. The time changes only with the status, as everywhere in Kubernetes."""
    since = {(condition.type, condition.status): condition.last_transition_time for condition in before}
    return [
        Condition(
            type=kind,
            status=assessment.status,
            observed_generation=generation,
            last_transition_time=since.get((kind, assessment.status), now),
            reason=assessment.reason,
            message=assessment.message[:2000],
        )
        for kind, assessment in assessments.items()
    ]


def true(reason: str, message: str) -> Assessment:
    return Assessment("True", reason, message)


def false(reason: str, message: str) -> Assessment:
    return Assessment("False", reason, message)


def unknown(reason: str, message: str) -> Assessment:
    return Assessment("Unknown", reason, message)

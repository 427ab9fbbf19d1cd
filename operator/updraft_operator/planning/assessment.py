"""One condition of a resource as it is decided, and as it is written."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, NamedTuple

from updraft_operator.api.status import Condition


class Assessment(NamedTuple):
    """A condition without its type, generation and transition time."""

    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


def dated(
    assessments: Mapping[str, Assessment], before: list[Condition], generation: int, now: datetime
) -> list[Condition]:
    """Add generation and transition time. The time changes only with the status, as everywhere in Kubernetes.

    Those that exist keep their order, as server-side apply does, or a status would differ from its own copy for ever.
    """
    places = {condition.type: place for place, condition in enumerate(before)}
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
        for kind, assessment in sorted(assessments.items(), key=lambda named: places.get(named[0], len(places)))
    ]


def unreadable(content: Mapping[str, Any], problem: str, now: datetime) -> dict[str, Any]:
    """The status of an object whose content is not understood: as it was, but neither Ready nor in progress."""
    status = dict(content.get("status") or {})
    kept = {entry["type"]: entry for entry in status.get("conditions", ()) if entry["type"] != "Reconciling"}
    generation = content["metadata"].get("generation")
    for kind, value in (("Ready", "False"), ("Stalled", "True")):
        before = kept.get(kind, {})
        is_same = before.get("status") == value
        since = before["lastTransitionTime"] if is_same else now.strftime("%Y-%m-%dT%H:%M:%SZ")
        text = {"reason": "Unreadable", "message": problem[:2000]}
        kept[kind] = {
            "type": kind,
            "status": value,
            "lastTransitionTime": since,
            **text,
            "observedGeneration": generation,
        }
    return {**status, "conditions": list(kept.values()), "observedGeneration": generation}


def true(reason: str, message: str) -> Assessment:
    return Assessment("True", reason, message)


def false(reason: str, message: str) -> Assessment:
    return Assessment("False", reason, message)


def unknown(reason: str, message: str) -> Assessment:
    return Assessment("Unknown", reason, message)

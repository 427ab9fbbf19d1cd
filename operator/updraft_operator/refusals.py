"""Writes that are refused: by the API server, or by the operator because the object belongs to somebody else."""

from collections.abc import Iterable
from typing import Any

from updraft_chassis.errors import Conflict, Forbidden, UpdraftError
from updraft_operator.api import names
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed, Refusal

_FORBIDDEN = {"exceeded quota": "QuotaExceeded", "because it is being terminated": "NamespaceTerminating"}
"""Reasons for which the API server forbids a write to everyone, by the text of its message."""


def refused(target: Ref, mark: str, error: UpdraftError) -> Refusal:
    """A write that the API server refused, with the reason for the status."""
    text, reason = str(error), "NameConflict" if isinstance(error, Conflict) else "InvalidPodTemplate"
    if isinstance(error, Forbidden):
        reason = next((reason for part, reason in _FORBIDDEN.items() if part in text), "Forbidden")
    return Refusal(ref=target, digest=mark, reason=reason, message=text[:1500])


def foreign(metadata: dict[str, Any], observed: Observed) -> str:
    """Why an object belongs to someone else; empty if it is ours, or unowned and labelled for us."""
    owners: Iterable[dict[str, Any]] = metadata.get("ownerReferences") or ()
    for owner in owners:
        is_same = owner.get("kind") in ("AdaptiveSpeculator", "DraftVersion") and owner.get("name") == observed.name
        if owner.get("controller") and owner.get("uid") != observed.speculator.metadata.uid and not is_same:
            return f"belongs to {owner.get('kind')} {owner.get('name')}"
    if any(owner.get("uid") == observed.speculator.metadata.uid for owner in owners):
        return ""
    if (metadata.get("labels") or {}).get(names.SPECULATOR) == observed.name:
        return ""
    mark = f"{names.SPECULATOR}={observed.name}"
    return f"does not belong to it; rename the AdaptiveSpeculator, or hand the object over by adding the label {mark}"

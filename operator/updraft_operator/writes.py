"""The content of statuses, Events and logs, and why a write is refused: by the API server, or because of another owner."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from updraft_chassis.errors import Conflict, Forbidden, UpdraftError
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest, digest
from updraft_operator.planning.objects import Key, Ref
from updraft_operator.planning.observed import Observed, Refusal
from updraft_operator.planning.plan import Event, Plan, ref
from updraft_operator.planning.runtime.upgrade import Stage
from updraft_operator.watching.cluster import KINDS

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
        is_same = owner.get("kind") == "AdaptiveSpeculator" and owner.get("name") == observed.name
        if owner.get("controller") and owner.get("uid") != observed.speculator.metadata.uid and not is_same:
            return f"belongs to {owner.get('kind')} {owner.get('name')}"
    if any(owner.get("uid") == observed.speculator.metadata.uid for owner in owners):
        return ""
    if (metadata.get("labels") or {}).get(names.SPECULATOR) == observed.name:
        return ""
    mark = f"{names.SPECULATOR}={observed.name}"
    return f"does not belong to it; rename the AdaptiveSpeculator, or hand the object over by adding the label {mark}"


def is_owned(content: dict[str, Any]) -> bool:
    """Whether an object is deleted with an AdaptiveSpeculator."""
    owners: Iterable[dict[str, Any]] = content["metadata"].get("ownerReferences") or ()
    return any(owner.get("kind") == "AdaptiveSpeculator" for owner in owners)


def event_content(key: Key, event: Event, now_unix_s: float) -> Manifest:
    now = datetime.fromtimestamp(now_unix_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    name = f"{event.name}.{digest({'reason': event.reason, 'message': event.message, 'uid': event.uid, 'at': now})}"
    about = {"kind": event.kind, "name": event.name, "uid": event.uid}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": key.namespace},
        "involvedObject": {"apiVersion": names.API_VERSION, "namespace": key.namespace, **about},
        "reason": event.reason,
        "message": event.message,
        "type": "Warning" if event.is_warning else "Normal",
        "source": {"component": names.MANAGER},
        "reportingComponent": names.MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }


def status_content(key: Key, target: Ref, seen: str, status: dict[str, Any]) -> Manifest:
    """With the resource version that the status follows from. A UID would not do: the API server ignores one in a status."""
    return {
        "apiVersion": KINDS[target.kind].prefix.removeprefix("/apis/"),
        "kind": target.kind,
        "metadata": {"name": target.name, "namespace": key.namespace, "resourceVersion": seen},
        "status": status,
    }


def steps(plan: Plan) -> frozenset[str]:
    """The steps of a plan, and those that wait for their turn, a clause each."""
    found = {f"apply {'/'.join(ref(content))}" for content in plan.apply}
    found |= {f"sign a certificate for Secret/{order.secret}" for order in plan.certificates}
    found |= {f"delete {'/'.join(target)}" for target in plan.delete}
    found |= {f"call {call.verb} {call.version or ''}".strip() + " on the registry" for call in plan.calls}
    if plan.upgrade is not None and plan.upgrade.stage is not Stage.CURRENT:
        found.add(f"update the pods: {plan.upgrade.says.message}")
    return frozenset(found)

"""Observations of one speculator, as input for the operator's plans."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from tests.support.manifests import CONFIG, UID, speculator

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import OURS
from updraft_operator.manifests.redis_users import Role, user_name, user_url
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import ConnectionState, Observed, RegistryView
from updraft_operator.planning.plan import Plan, objects
from updraft_operator.planning.pods import PodProblem, PodState

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
NOW_S = NOW.timestamp()
PASSWORDS = {role: 32 * digits for role, digits in zip(Role, ("0a", "0b"), strict=True)}
FRESH = {role: 32 * digits for role, digits in zip(Role, ("1a", "1b"), strict=True)}
"""Passwords in the Secrets of the roles, and new ones."""


def redis_urls(url: str = "redis://:secret@own", passwords: Mapping[Role, str] = PASSWORDS) -> dict[Role, str]:
    """What those Secrets have with this Redis of the operator."""
    users = {role: user_name(CONFIG.installation, "team", "qwen", role) for role in Role}
    return {role: user_url(url, users[role], passwords[role]) for role in Role}


def observed(spec: Mapping[str, Any] | None = None, **more: Any) -> Observed:
    """An observation of a speculator with this spec, by default after an installation with a Redis."""
    given = {
        "speculator": speculator(spec),
        "config": CONFIG,
        "redis_url": "redis://:secret@own",
        "fresh_passwords": {(place, role): FRESH[role] for place in OURS for role in Role},
    }
    return Observed(**{**given, "redis_urls": redis_urls(), **more})


def settled(spec: Mapping[str, Any] | None = None, **more: Any) -> Observed:
    """The same, with all its objects as applied."""
    seen = observed(spec, **more)
    children = {child.ref: child for child in map(as_child, objects(seen))}
    return observed(spec, **{**more, "children": {**children, **more.get("children", {})}})


def as_child(content: Manifest, *, uid: str = "", version: str = "10", **more: Any) -> Child:
    """A manifest as the API server stores it; `more` adds a status or metadata."""
    body = deepcopy(content)
    body["metadata"] |= {"uid": uid or f"uid-of-{body['metadata']['name']}", "resourceVersion": version}
    body["metadata"] |= more.pop("metadata", {})
    return Child.of(content["kind"], {**body, **more})


def pod(
    name: str = "qwen-serving-1",
    part: str = "serving",
    *,
    is_ready: bool = False,
    problem: tuple[str, str] | None = None,
    **more: Any,
) -> PodState:

    fields = PodProblem(reason=problem[0], message=problem[1]) if problem else None
    state = {"is_ready": is_ready, "is_ending": False, "is_finished": False, "problem": fields, **more}
    return PodState(name=name, part=part, **state)


def ready_pods() -> tuple[PodState, ...]:
    """One pod per part."""
    ends = {"serving": "6d4b75cb6d-hwtxs", "trainer": "7f9c8d5b6-x2x4z", "registry": "0"}
    return tuple(pod(f"qwen-{part}-{end}", part, is_ready=True) for part, end in ends.items())


def version(number: int, phase: "pb.Phase.ValueType" = pb.PHASE_STABLE, **more: Any) -> pb.Version:
    """A version in the registry, by default from the trainer."""
    learned = pb.Provenance(samples=1000, first_trace_id="first", last_trace_id="last")
    manifest = pb.Manifest(
        digest=f"sha256:{number:064x}",
        source=more.pop("source", pb.SOURCE_TRAINER),
        parent_version=number - 1,
        provenance=learned,
        evaluation=pb.Evaluation(baseline_version=number - 1, lookahead=3),
    )
    times = {"published_unix_ms": number * 1000, "phase_since_unix_ms": number * 1000 + 500}
    return pb.Version(version=number, manifest=manifest, phase=phase, reason="because", **{**times, **more})


def connected(
    versions: Iterable[pb.Version] = (), transitions: Iterable[pb.Transition] = (), **state: Any
) -> RegistryView:
    """A connected registry with these versions; it follows the default policy unless `state` has another."""
    from updraft_operator.planning.policy import policy

    kept = tuple(versions)
    stable = max((each.version for each in kept if each.phase == pb.PHASE_STABLE), default=0)
    fields = {
        "speculator": "qwen",
        "stable": stable,
        "candidate": max((each.version for each in kept if each.phase == pb.PHASE_CANARY), default=0),
        "latest": max((each.version for each in kept), default=0),
        "pods": pb.Pods(connected=1, serving_stable=1) if stable else pb.Pods(connected=1),
        "policy": policy(speculator().spec.rollout),
        **state,
    }
    return RegistryView(
        connection=ConnectionState.CONNECTED,
        state=pb.SpeculatorState(**fields),
        versions=kept,
        transitions=tuple(transitions),
    )


def traffic(number: int, length: float, steps: int = 1000) -> pb.VersionTraffic:
    """The traffic that pods served with a version."""
    return pb.VersionTraffic(version=number, verify_steps=steps, tokens=round(length * steps))


def transition(number: int, to: "pb.Phase.ValueType", *, at_s: int = 100, **more: Any) -> pb.Transition:
    """An entry of the registry's history."""
    return pb.Transition(version=number, to_phase=to, unix_ms=at_s * 1000, actor="registry", reason="because", **more)


def draft(number: int, *, name: str = "", status: Mapping[str, Any] | None = None, **spec: Any) -> DraftVersion:
    """The DraftVersion of a version."""
    fields = {"source": "Trainer", "version": number, "digest": f"sha256:{number:064x}"}
    return DraftVersion.model_validate(
        {
            "metadata": _metadata(name or names.draft_version("qwen", number)),
            "spec": {"speculatorRef": {"name": "qwen"}, **fields, **spec},
            "status": dict(status or {}),
        }
    )


def draft_import(
    name: str = "mine", *, generation: int = 1, status: Mapping[str, Any] | None = None, **spec: Any
) -> DraftImport:
    """A user's import of a draft."""
    return DraftImport.model_validate(
        {
            "metadata": {**_metadata(name), "generation": generation},
            "spec": {"speculatorRef": {"name": "qwen"}, "uri": "hf://a/b", **spec},
            "status": dict(status or {}),
        }
    )


def imported(number: int, digest: str = "") -> dict[str, Any]:
    """The status of an import that became a version, and the result of its Job."""
    return {"version": number, "digest": digest or f"sha256:{number:064x}"}


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "namespace": "team", "uid": f"uid-{name}", "generation": 1, "resourceVersion": "5"}


def workload(kind: str, part: str, status: Mapping[str, Any], **spec: Any) -> dict[Ref, Child]:
    """The Deployment or StatefulSet of a part, with this status."""
    content = {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {
            "name": names.child("qwen", part),
            "namespace": "team",
            "ownerReferences": [{"kind": "AdaptiveSpeculator", "name": "qwen", "uid": UID, "controller": True}],
        },
        "spec": spec,
    }
    child = as_child(content, status=dict(status))
    return {child.ref: child}


def is_empty(plan: Plan) -> bool:
    """Whether the observed state matches the desired state."""
    of_others: Any = {
        "upgrade": None,
        "users": None,
        "dedicated_users": (),
        "is_moving": False,
        "drains": None,
        "leaves_shared": False,
        "reads": None,
    }
    return replace(plan, again_s=None, **of_others) == Plan()

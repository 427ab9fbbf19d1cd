"""What a person reads in `kubectl get`: one verdict an aspect, each with a reason and what to do about it.

Ready is Accepted and ServingReady and RegistryReady; the others stand beside it, for serving goes on without them.
Reasons are constants of the API; what they mean is told by docs/reference/conditions.md.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.rollout import Strategy
from updraft_operator.manifests.redis import has_redis
from updraft_operator.planning.acceptance import acceptance_length
from updraft_operator.planning.objects import Child
from updraft_operator.planning.observed import Link, Observed
from updraft_operator.planning.pods import PodState, worst

_ENOUGH_STEPS = 200
"""Verify steps below which an acceptance length says little."""

_COLLAPSED = 1.05
"""Tokens a verify step at which drafting is wasted: 1 is no draft at all."""

ASKS_A_PERSON = "promote or reject it"
"""In the registry's words about a canary that goes on by nobody's hand but a person's."""

Status = Literal["True", "False", "Unknown"]
Said = tuple[Status, str, str]
"""Status, reason, message."""

_OF_THE_REGISTRY = ("VersionNotFound", "VersionUnusable")
"""Reasons against a spec that the registry's versions give."""

_OF_THE_SPEC = ("Suspended", "SpeculationDisabled")
"""Reasons that the spec alone gives."""

_CONDEMNED = (pb.PHASE_REJECTED, pb.PHASE_ROLLED_BACK, pb.PHASE_FAILED)
_WAITING = (pb.PHASE_PENDING, pb.PHASE_HELD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One condition."""

    type: str
    status: Status
    reason: str
    message: str


def conditions(seen: Observed) -> list[Verdict]:
    """All of them, in the order in which a person asks."""
    accepted, serving, registry = _accepted(seen), _serving_ready(seen), _registry_ready(seen)
    trainer = _trainer_ready(seen)
    return [
        _ready((accepted, serving, registry)),
        accepted,
        serving,
        registry,
        trainer,
        _adapting(seen, trainer, registry),
        _speculation(seen),
        _progressing(seen),
    ]


def _ready(parts: tuple[Verdict, ...]) -> Verdict:
    for part in parts:
        if part.status != "True":
            return _verdict("Ready", "False", part.reason, part.message)
    serving = next(part for part in parts if part.type == "ServingReady")
    is_rolling = serving.reason == "RollingOut"
    return _verdict("Ready", "True", "Ready", serving.message if is_rolling else "requests are served")


def _accepted(seen: Observed) -> Verdict:
    kind = "Accepted"
    for refusal in seen.refusals:
        if refusal.reason in ("NameConflict", "InvalidPodTemplate", "Forbidden", "InvalidRollout"):
            return _verdict(kind, "False", refusal.reason, refusal.message)
    if seen.missing_secrets:
        listed = ", ".join(seen.missing_secrets)
        return _verdict(kind, "False", "SecretNotFound", f"the spec names Secrets that are not there: {listed}")
    for field, number in _named_versions(seen):
        what = f"spec.rollout.{field} is {number}, and the registry has no such version"
        return _verdict(kind, "False", "VersionNotFound", f"{what}: {_versions_said(seen)}")
    before, rollout = _before(seen, kind), seen.speculator.spec.rollout
    is_named = rollout.pinned_version or rollout.promoted_version
    if seen.registry.state is None and is_named and before is not None and before[1] in _OF_THE_REGISTRY:
        return _verdict(kind, *before)
    if condemned := _condemned_pin(seen):
        return _verdict(kind, "False", "VersionUnusable", condemned)
    return _verdict(kind, "True", "SpecAccepted", "the spec can be followed")


def _condemned_pin(seen: Observed) -> str:
    """Why the pinned version cannot serve; empty if it can."""
    pinned = seen.speculator.spec.rollout.pinned_version
    for version in seen.registry.versions:
        if version.version == pinned and version.phase in _CONDEMNED:
            return f"spec.rollout.pinnedVersion is {pinned}, which never serves again: {version.reason}"
    return ""


def _named_versions(seen: Observed) -> Iterable[tuple[str, int]]:
    """Versions that the spec names and the registry does not know, by what it said last."""
    if seen.registry.state is None:
        return
    rollout, known = seen.speculator.spec.rollout, {version.version for version in seen.registry.versions}
    if rollout.pinned_version and rollout.pinned_version not in known:
        yield "pinnedVersion", rollout.pinned_version
    # An older one that is not there any more was promoted long ago: the field stays, and means nothing now.
    if rollout.promoted_version and rollout.promoted_version > seen.registry.state.latest:
        yield "promotedVersion", rollout.promoted_version


def _versions_said(seen: Observed) -> str:
    known = sorted(version.version for version in seen.registry.versions)
    return f"it has {', '.join(map(str, known))}" if known else "it has none yet"


def _serving_ready(seen: Observed) -> Verdict:
    kind, spec = "ServingReady", seen.speculator.spec
    if spec.suspend:
        return _verdict(kind, "False", "Suspended", "spec.suspend is true: nothing serves")
    pods, deployment = seen.pods_of(names.SERVING), seen.child("Deployment", names.SERVING)
    wished = wished_replicas(seen)
    if wished == 0:
        return _verdict(kind, "False", "Suspended", "spec.serving.replicas is 0: nothing serves")
    num_ready = sum(pod.is_ready and not pod.is_ending for pod in pods)
    said = f"{num_ready} of {wished} pods are ready"
    if num_ready >= max(1, wished - 1):  # the disruption budget lets one be away
        return _rolling(kind, deployment, pods, said) or _verdict(kind, "True", "PodsReady", said)
    return _over_quota(kind, seen, names.SERVING) or _not_ready(kind, deployment, pods, said)


def _rolling(kind: str, deployment: Child | None, pods: tuple[PodState, ...], said: str) -> Verdict | None:
    """Enough pods serve, but some are of an older template: the new ones may be in trouble."""
    if deployment is None or deployment.status.get("updatedReplicas", 0) >= deployment.status.get("replicas", 0):
        return None
    found = worst(pods)
    why = f"; {found[0].name}: {found[1].reason}: {found[1].message}" if found is not None else ""
    return _verdict(kind, "True", "RollingOut", f"{said}; pods of the changed template come{why}")


def _over_quota(kind: str, seen: Observed, part: str) -> Verdict | None:
    """An object of a part that a ResourceQuota does not let in."""
    of_part = {names.child(seen.name, part), *([seen.name] if part == names.SERVING else [])}
    for refusal in seen.refusals:
        if refusal.reason == "QuotaExceeded" and refusal.ref.name in of_part:
            return _verdict(kind, "False", refusal.reason, f"{'/'.join(refusal.ref)}: {refusal.message}")
    return None


def wished_replicas(seen: Observed) -> int:
    """Inference pods that there should be: what an autoscaler of the Deployment says, if there is one."""
    deployment = seen.child("Deployment", names.SERVING)
    if seen.speculator.spec.suspend:
        return 0
    if deployment is not None and deployment.is_scaled_by_others:
        return int(deployment.live()["spec"].get("replicas", 1))
    return seen.speculator.spec.serving.replicas


def _not_ready(kind: str, workload: Child | None, pods: tuple[PodState, ...], said: str) -> Verdict:
    found = worst(pods)
    if found is not None:
        pod, trouble = found
        return _verdict(kind, "False", trouble.reason, f"{said}; {pod.name}: {trouble.message}")
    if workload is not None:
        for condition in workload.status.get("conditions", ()):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                return _verdict(kind, "False", "QuotaExceeded", f"{said}; {condition.get('message', '')}")
    if any(not pod.is_ready for pod in pods) or not pods:
        return _verdict(kind, "False", "ModelLoading", f"{said}; the others start")
    return _verdict(kind, "False", "RollingOut", said)


def _registry_ready(seen: Observed) -> Verdict:
    kind, view = "RegistryReady", seen.registry
    if view.link is Link.CONNECTED:
        return _verdict(kind, "True", "Connected", "the registry answers")
    if view.link is Link.CONNECTING and (before := _before(seen, kind)):
        return _verdict(kind, *before)
    pods = seen.pods_of(names.REGISTRY)
    found = worst(pods)
    if found is not None and not any(pod.is_ready for pod in pods):
        pod, trouble = found
        return _verdict(kind, "False", trouble.reason, f"{pod.name}: {trouble.message}")
    link = Link.STARTING if view.link is Link.CONNECTING else view.link
    said = _verdict(kind, "False", link.value, view.trouble or "the registry's pod is not ready yet")
    return _over_quota(kind, seen, names.REGISTRY) or said


def _trainer_ready(seen: Observed) -> Verdict:
    kind, spec = "TrainerReady", seen.speculator.spec
    if not spec.traces.enabled:
        return _verdict(kind, "False", "Disabled", "spec.traces.enabled is false: there is nothing to learn from")
    if not has_redis(seen.speculator, seen.around):
        said = "the operator has no Redis, and spec.traces.redis names none: nothing is captured"
        return _verdict(kind, "False", "NoRedis", said)
    if spec.suspend or spec.trainer.suspend:
        return _verdict(kind, "False", "Suspended", "the trainer is suspended; serving goes on with what it has")
    pods = seen.pods_of(names.TRAINER)
    if any(pod.is_ready for pod in pods):
        return _verdict(kind, "True", "Training", "the trainer runs")
    found = worst(pods)
    if found is not None:
        pod, trouble = found
        return _verdict(kind, "False", trouble.reason, f"{pod.name}: {trouble.message}")
    starting = _verdict(kind, "False", "Starting", "the trainer's pod is not ready yet")
    return _over_quota(kind, seen, names.TRAINER) or starting


def _adapting(seen: Observed, trainer: Verdict, registry: Verdict) -> Verdict:
    kind = "Adapting"
    if seen.speculator.spec.suspend:
        return _verdict(kind, "False", "Suspended", "spec.suspend is true")
    if trainer.status != "True":
        return _verdict(kind, "False", "TrainerNotReady", trainer.message)
    if registry.status != "True":
        return _verdict(kind, "False", "RegistryNotReady", registry.message)
    state = seen.registry.state
    if state is not None and state.capture_problem:
        return _verdict(kind, "False", "CaptureUnavailable", f"nothing is captured by {state.capture_problem}")
    return _verdict(kind, "True", "Adapting", "drafts are learned from the traffic")


def _speculation(seen: Observed) -> Verdict:
    status, reason, message = next(_of_speculation(seen))
    return _verdict("SpeculationEffective", status, reason, message)


def _of_speculation(seen: Observed) -> Iterator[Said]:
    """What holds first is said."""
    state, spec = seen.registry.state, seen.speculator.spec
    if spec.suspend:
        yield "Unknown", "Suspended", "nothing serves"
    if spec.draft.lookahead == 0:
        yield "False", "SpeculationDisabled", "spec.draft.lookahead is 0"
    before = _before(seen, "SpeculationEffective")
    if state is None and before is not None and before[1] not in _OF_THE_SPEC:
        yield before
    if state is None or not state.stable:
        yield "Unknown", "NoDraft", "no draft serves yet: tokens come one a step, or by lookup"
        return
    num_without = state.pods.connected - state.pods.serving_stable - state.pods.serving_candidate
    if num_without > 0:
        said = f"{num_without} of {state.pods.connected} pods do not hold version {state.stable} yet"
        yield "False", "DraftNotLoaded", said
    length, steps = acceptance_length(state, state.stable)
    if length is None or steps < _ENOUGH_STEPS:
        yield "Unknown", "TooFewSamples", "too little traffic to tell yet"
        return
    if length < _COLLAPSED:
        said = "the stable draft is hardly ever right; the trainer has to catch up, or pin another version"
        yield "False", "AcceptanceCollapsed", said
    yield "True", "Effective", "drafts are accepted"


def _progressing(seen: Observed) -> Verdict:
    status, reason, message = next(_of_progress(seen))
    return _verdict("Progressing", status, reason, message)


def _of_progress(seen: Observed) -> Iterator[Said]:
    """What holds first is said."""
    state, rollout = seen.registry.state, seen.speculator.spec.rollout
    before = _before(seen, "Progressing")
    if state is None and before is not None:
        yield before
    if state is None or not state.latest:
        yield "Unknown", "NoVersion", "no draft was published yet"
        return
    if rollout.pinned_version is not None and state.HasField("pinned") and state.pinned == rollout.pinned_version:
        yield "False", "Pinned", f"version {rollout.pinned_version} is pinned; newer ones are held"
    if rollout.paused:
        yield "False", "Paused", "spec.rollout.paused is true"
    if state.candidate:
        yield _of_canary(state)
    waiting = [version.version for version in seen.registry.versions if version.phase in _WAITING]
    if waiting and rollout.strategy is Strategy.MANUAL:
        yield "False", "Waiting", f"version {max(waiting)} waits for spec.rollout.promotedVersion"
    if waiting:
        yield "True", "Waiting", f"version {max(waiting)} waits to be tried"
    yield "True", "Complete", f"version {state.stable} serves" if state.stable else "no draft serves"


def _before(seen: Observed, kind: str) -> Said | None:
    """What was said last: it stands while the registry, whose word it is, has said nothing to this process yet."""
    told = (each for each in seen.speculator.status.conditions if each.type == kind)
    return next(((each.status, each.reason, each.message) for each in told), None)


def _of_canary(state: pb.SpeculatorState) -> Said:
    """A canary ends by its deadline or its verdict; one that goes on after either waits for a person."""
    if ASKS_A_PERSON in state.message:
        waits = f"version {state.candidate} waits for a person: promote it, or pin another"
        if "no verdict" in state.message:
            return "False", "Inconclusive", waits
        return "False", "CanaryFailed", f"it failed, and spec.rollout.autoRollback is false; {waits}"
    return "True", "Canary", f"version {state.candidate} is tried"


def _verdict(kind: str, status: Status, reason: str, message: str) -> Verdict:
    return Verdict(type=kind, status=status, reason=reason, message=message[:2000])

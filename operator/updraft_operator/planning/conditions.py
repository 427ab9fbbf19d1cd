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
from updraft_operator.planning.observed import ConnectionState, Observed
from updraft_operator.planning.pods import PodState, worst

_ENOUGH_STEPS = 200
"""Verify steps below which an acceptance length says little."""

_COLLAPSED = 1.05
"""Tokens a verify step at which drafting is wasted: 1 is no draft at all."""

ASKS_A_PERSON = "promote or reject it"
"""In the registry's words about a canary that goes on by nobody's hand but a person's."""

Status = Literal["True", "False", "Unknown"]
Assessment = tuple[Status, str, str]
"""Status, reason, message."""

_OF_THE_REGISTRY = ("VersionNotFound", "VersionUnusable")
"""Reasons against a spec that the registry's versions give."""

_OF_THE_SPEC = ("Suspended", "SpeculationDisabled")
"""Reasons that the spec alone gives."""

_CONDEMNED = (pb.PHASE_REJECTED, pb.PHASE_ROLLED_BACK, pb.PHASE_FAILED)
_WAITING = (pb.PHASE_PENDING, pb.PHASE_HELD)


@dataclass(frozen=True, slots=True, kw_only=True)
class UndatedCondition:
    """One condition."""

    type: str
    status: Status
    reason: str
    message: str


def conditions(observed: Observed) -> list[UndatedCondition]:
    """All of them, in the order in which a person asks."""
    accepted, serving, registry = _accepted(observed), _serving_ready(observed), _registry_ready(observed)
    trainer = _trainer_ready(observed)
    return [
        _ready((accepted, serving, registry)),
        accepted,
        serving,
        registry,
        trainer,
        _adapting(observed, trainer, registry),
        _speculation(observed),
        _progressing(observed),
    ]


def _ready(parts: tuple[UndatedCondition, ...]) -> UndatedCondition:
    for part in parts:
        if part.status != "True":
            return _condition("Ready", "False", part.reason, part.message)
    serving = next(part for part in parts if part.type == "ServingReady")
    is_rolling = serving.reason == "RollingOut"
    return _condition("Ready", "True", "Ready", serving.message if is_rolling else "requests are served")


def _accepted(observed: Observed) -> UndatedCondition:
    kind = "Accepted"
    for refusal in observed.refusals:
        if refusal.reason in ("NameConflict", "InvalidPodTemplate", "Forbidden", "InvalidRollout"):
            return _condition(kind, "False", refusal.reason, refusal.message)
    if observed.missing_secrets:
        listed = ", ".join(observed.missing_secrets)
        return _condition(kind, "False", "SecretNotFound", f"the spec names Secrets that are not there: {listed}")
    for field, number in _named_versions(observed):
        what = f"spec.rollout.{field} is {number}, and the registry has no such version"
        return _condition(kind, "False", "VersionNotFound", f"{what}: {_versions_said(observed)}")
    before, rollout = _before(observed, kind), observed.speculator.spec.rollout
    is_named = rollout.pinned_version or rollout.promoted_version
    if observed.registry.state is None and is_named and before is not None and before[1] in _OF_THE_REGISTRY:
        return _condition(kind, *before)
    if condemned := _condemned_pin(observed):
        return _condition(kind, "False", "VersionUnusable", condemned)
    return _condition(kind, "True", "SpecAccepted", "the spec can be followed")


def _condemned_pin(observed: Observed) -> str:
    """Why the pinned version cannot serve; empty if it can."""
    pinned = observed.speculator.spec.rollout.pinned_version
    for version in observed.registry.versions:
        if version.version == pinned and version.phase in _CONDEMNED:
            return f"spec.rollout.pinnedVersion is {pinned}, which never serves again: {version.reason}"
    return ""


def _named_versions(observed: Observed) -> Iterable[tuple[str, int]]:
    """Versions that the spec names and the registry does not know, by what it said last."""
    if observed.registry.state is None:
        return
    rollout, known = observed.speculator.spec.rollout, {version.version for version in observed.registry.versions}
    if rollout.pinned_version and rollout.pinned_version not in known:
        yield "pinnedVersion", rollout.pinned_version
    # An older one that is not there any more was promoted long ago: the field stays, and means nothing now.
    if rollout.promoted_version and rollout.promoted_version > observed.registry.state.latest:
        yield "promotedVersion", rollout.promoted_version


def _versions_said(observed: Observed) -> str:
    known = sorted(version.version for version in observed.registry.versions)
    return f"it has {', '.join(map(str, known))}" if known else "it has none yet"


def _serving_ready(observed: Observed) -> UndatedCondition:
    kind, spec = "ServingReady", observed.speculator.spec
    if spec.suspend:
        return _condition(kind, "False", "Suspended", "spec.suspend is true: nothing serves")
    pods, deployment = observed.pods_of(names.SERVING), observed.child("Deployment", names.SERVING)
    desired = desired_replicas(observed)
    if desired == 0:
        return _condition(kind, "False", "Suspended", "spec.serving.replicas is 0: nothing serves")
    num_ready = sum(pod.is_ready and not pod.is_ending for pod in pods)
    said = f"{num_ready} of {desired} pods are ready"
    if num_ready >= max(1, desired - 1):  # the disruption budget lets one be away
        return _rolling(kind, deployment, pods, said) or _condition(kind, "True", "PodsReady", said)
    return _over_quota(kind, observed, names.SERVING) or _not_ready(kind, deployment, pods, said)


def _rolling(kind: str, deployment: Child | None, pods: tuple[PodState, ...], said: str) -> UndatedCondition | None:
    """Enough pods serve, but some are of an older template: the new ones may be in trouble."""
    if deployment is None or deployment.status.get("updatedReplicas", 0) >= deployment.status.get("replicas", 0):
        return None
    found = worst(pods)
    why = f"; {found[0].name}: {found[1].reason}: {found[1].message}" if found is not None else ""
    return _condition(kind, "True", "RollingOut", f"{said}; pods of the changed template come{why}")


def _over_quota(kind: str, observed: Observed, part: str) -> UndatedCondition | None:
    """An object of a part that a ResourceQuota does not let in."""
    of_part = {names.child(observed.name, part), *([observed.name] if part == names.SERVING else [])}
    for refusal in observed.refusals:
        if refusal.reason == "QuotaExceeded" and refusal.ref.name in of_part:
            return _condition(kind, "False", refusal.reason, f"{'/'.join(refusal.ref)}: {refusal.message}")
    return None


def desired_replicas(observed: Observed) -> int:
    """Inference pods that there should be: what an autoscaler of the Deployment says, if there is one."""
    deployment = observed.child("Deployment", names.SERVING)
    if observed.speculator.spec.suspend:
        return 0
    if deployment is not None and deployment.is_scaled_by_others:
        return int(deployment.live()["spec"].get("replicas", 1))
    return observed.speculator.spec.serving.replicas


def _not_ready(kind: str, workload: Child | None, pods: tuple[PodState, ...], said: str) -> UndatedCondition:
    found = worst(pods)
    if found is not None:
        pod, problem = found
        return _condition(kind, "False", problem.reason, f"{said}; {pod.name}: {problem.message}")
    if workload is not None:
        for condition in workload.status.get("conditions", ()):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                return _condition(kind, "False", "QuotaExceeded", f"{said}; {condition.get('message', '')}")
    if any(not pod.is_ready for pod in pods) or not pods:
        return _condition(kind, "False", "ModelLoading", f"{said}; the others start")
    return _condition(kind, "False", "RollingOut", said)


def _registry_ready(observed: Observed) -> UndatedCondition:
    kind, view = "RegistryReady", observed.registry
    if view.connection is ConnectionState.CONNECTED:
        return _condition(kind, "True", "Connected", "the registry answers")
    if view.connection is ConnectionState.CONNECTING and (before := _before(observed, kind)):
        return _condition(kind, *before)
    pods = observed.pods_of(names.REGISTRY)
    found = worst(pods)
    if found is not None and not any(pod.is_ready for pod in pods):
        pod, problem = found
        return _condition(kind, "False", problem.reason, f"{pod.name}: {problem.message}")
    connection = ConnectionState.STARTING if view.connection is ConnectionState.CONNECTING else view.connection
    said = _condition(kind, "False", connection.value, view.problem or "the registry's pod is not ready yet")
    return _over_quota(kind, observed, names.REGISTRY) or said


def _trainer_ready(observed: Observed) -> UndatedCondition:
    kind, spec = "TrainerReady", observed.speculator.spec
    if not spec.traces.enabled:
        return _condition(kind, "False", "Disabled", "spec.traces.enabled is false: there is nothing to learn from")
    if not has_redis(observed.speculator, observed.config):
        said = "the operator has no Redis, and spec.traces.redis names none: nothing is captured"
        return _condition(kind, "False", "NoRedis", said)
    if spec.suspend or spec.trainer.suspend:
        return _condition(kind, "False", "Suspended", "the trainer is suspended; serving goes on with what it has")
    pods = observed.pods_of(names.TRAINER)
    if any(pod.is_ready for pod in pods):
        return _condition(kind, "True", "Training", "the trainer runs")
    found = worst(pods)
    if found is not None:
        pod, problem = found
        return _condition(kind, "False", problem.reason, f"{pod.name}: {problem.message}")
    starting = _condition(kind, "False", "Starting", "the trainer's pod is not ready yet")
    return _over_quota(kind, observed, names.TRAINER) or starting


def _adapting(observed: Observed, trainer: UndatedCondition, registry: UndatedCondition) -> UndatedCondition:
    kind = "Adapting"
    if observed.speculator.spec.suspend:
        return _condition(kind, "False", "Suspended", "spec.suspend is true")
    if trainer.status != "True":
        return _condition(kind, "False", "TrainerNotReady", trainer.message)
    if registry.status != "True":
        return _condition(kind, "False", "RegistryNotReady", registry.message)
    state = observed.registry.state
    if state is not None and state.capture_problem:
        return _condition(kind, "False", "CaptureUnavailable", f"nothing is captured by {state.capture_problem}")
    return _condition(kind, "True", "Adapting", "drafts are learned from the traffic")


def _speculation(observed: Observed) -> UndatedCondition:
    status, reason, message = next(_of_speculation(observed))
    return _condition("SpeculationEffective", status, reason, message)


def _of_speculation(observed: Observed) -> Iterator[Assessment]:
    """What holds first is said."""
    state, spec = observed.registry.state, observed.speculator.spec
    if spec.suspend:
        yield "Unknown", "Suspended", "nothing serves"
    if spec.draft.lookahead == 0:
        yield "False", "SpeculationDisabled", "spec.draft.lookahead is 0"
    before = _before(observed, "SpeculationEffective")
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


def _progressing(observed: Observed) -> UndatedCondition:
    status, reason, message = next(_of_progress(observed))
    return _condition("Progressing", status, reason, message)


def _of_progress(observed: Observed) -> Iterator[Assessment]:
    """What holds first is said."""
    state, rollout = observed.registry.state, observed.speculator.spec.rollout
    before = _before(observed, "Progressing")
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
    waiting = [version.version for version in observed.registry.versions if version.phase in _WAITING]
    if waiting and rollout.strategy is Strategy.MANUAL:
        yield "False", "Waiting", f"version {max(waiting)} waits for spec.rollout.promotedVersion"
    if waiting:
        yield "True", "Waiting", f"version {max(waiting)} waits to be tried"
    yield "True", "Complete", f"version {state.stable} serves" if state.stable else "no draft serves"


def _before(observed: Observed, kind: str) -> Assessment | None:
    """What was said last: it stands while the registry, whose word it is, has said nothing to this process yet."""
    told = (each for each in observed.speculator.status.conditions if each.type == kind)
    return next(((each.status, each.reason, each.message) for each in told), None)


def _of_canary(state: pb.SpeculatorState) -> Assessment:
    """A canary ends by its deadline or its verdict; one that goes on after either waits for a person."""
    if ASKS_A_PERSON in state.message:
        waits = f"version {state.candidate} waits for a person: promote it, or pin another"
        if "no verdict" in state.message:
            return "False", "Inconclusive", waits
        return "False", "CanaryFailed", f"it failed, and spec.rollout.autoRollback is false; {waits}"
    return "True", "Canary", f"version {state.candidate} is tried"


def _condition(kind: str, status: Status, reason: str, message: str) -> UndatedCondition:
    return UndatedCondition(type=kind, status=status, reason=reason, message=message[:2000])

"""Conditions of an AdaptiveSpeculator: one per aspect, each with a reason and a message.

Ready combines Accepted, ServingReady and RegistryReady; serving continues without the others. Reasons are constants of
the API and are documented in docs/reference/conditions.md.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.manifests.redis import has_redis
from updraft_operator.planning.acceptance import acceptance_length
from updraft_operator.planning.objects import Child
from updraft_operator.planning.observed import ConnectionState, Observed
from updraft_operator.planning.pods import PodState, worst
from updraft_rollouts.terms import Phase, Strategy

_ENOUGH_STEPS = 200
"""Minimum number of verify steps for a meaningful acceptance length."""

_COLLAPSED = 1.05
"""Tokens per verify step at which drafting is useless: 1 is the value without a draft."""

_COLLAPSED_MESSAGE = "almost no token of the stable draft is accepted; wait for the trainer, or pin another version"

ASKS_A_PERSON = "promote or reject it"
"""Part of the registry's message about a canary that waits for a person's decision."""

ConditionStatus = Literal["True", "False", "Unknown"]
Assessment = tuple[ConditionStatus, str, str]
"""Status, reason, message."""

_OF_THE_REGISTRY = ("VersionNotFound", "VersionUnusable")
"""Reasons of Accepted that depend on the registry's versions."""

_OF_THE_SPEC = ("Suspended", "SpeculationDisabled")
"""Reasons that depend on the spec alone."""

_WAITING = (pb.PHASE_PENDING, pb.PHASE_HELD)


@dataclass(frozen=True, slots=True, kw_only=True)
class UndatedCondition:
    """A condition without its generation and transition time."""

    type: str
    status: ConditionStatus
    reason: str
    message: str


def conditions(observed: Observed) -> list[UndatedCondition]:
    """All conditions, the most important first."""
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
    return _condition("Ready", "True", "Ready", serving.message if is_rolling else "serving requests")


def _accepted(observed: Observed) -> UndatedCondition:
    kind = "Accepted"
    for refusal in observed.refusals:
        if refusal.reason in ("NameConflict", "InvalidPodTemplate", "Forbidden", "InvalidRollout"):
            return _condition(kind, "False", refusal.reason, refusal.message)
    if observed.missing_secrets:
        listed = ", ".join(observed.missing_secrets)
        return _condition(
            kind, "False", "SecretNotFound", f"the spec names Secrets that do not exist or lack the entry: {listed}"
        )
    for field, number in _named_versions(observed):
        problem = f"spec.rollout.{field} is {number}, but the registry has no such version"
        return _condition(kind, "False", "VersionNotFound", f"{problem}: {_known_versions(observed)}")
    before, rollout = _before(observed, kind), observed.speculator.spec.rollout
    is_named = rollout.pinned_version or rollout.promoted_version
    if observed.registry.state is None and is_named and before is not None and before[1] in _OF_THE_REGISTRY:
        return _condition(kind, *before)
    if condemned := _condemned_pin(observed):
        return _condition(kind, "False", "VersionUnusable", condemned)
    return _condition(kind, "True", "SpecAccepted", "the spec is valid")


def _condemned_pin(observed: Observed) -> str:
    """Why the pinned version cannot serve; empty if it can."""
    pinned = observed.speculator.spec.rollout.pinned_version
    for version in observed.registry.versions:
        if version.version == pinned and (Phase.from_proto(version.phase) or Phase.PENDING).is_condemned:
            return f"spec.rollout.pinnedVersion is {pinned}, which can never serve again: {version.reason}"
    return ""


def _named_versions(observed: Observed) -> Iterable[tuple[str, int]]:
    """Versions that the spec names and that are missing in the registry's last known state."""
    if observed.registry.state is None:
        return
    rollout, known = observed.speculator.spec.rollout, {version.version for version in observed.registry.versions}
    if rollout.pinned_version and rollout.pinned_version not in known:
        yield "pinnedVersion", rollout.pinned_version
    # An older version that no longer exists was promoted long ago: the field has no effect any more.
    if rollout.promoted_version and rollout.promoted_version > observed.registry.state.latest:
        yield "promotedVersion", rollout.promoted_version


def _known_versions(observed: Observed) -> str:
    known = sorted(version.version for version in observed.registry.versions)
    return f"it has {', '.join(map(str, known))}" if known else "it has no versions yet"


def _serving_ready(observed: Observed) -> UndatedCondition:
    kind, spec = "ServingReady", observed.speculator.spec
    if spec.suspend:
        return _condition(kind, "False", "Suspended", "spec.suspend is true")
    pods, deployment = observed.pods_of(names.SERVING), observed.child("Deployment", names.SERVING)
    desired = desired_replicas(observed)
    if desired == 0:
        return _condition(kind, "False", "Suspended", "spec.serving.replicas is 0")
    num_ready = sum(pod.is_ready and not pod.is_ending for pod in pods)
    summary = f"{num_ready} of {desired} pods are ready"
    if num_ready >= max(1, desired - 1):  # the disruption budget allows one unavailable pod
        return _rolling(kind, deployment, pods, summary) or _condition(kind, "True", "PodsReady", summary)
    return _over_quota(kind, observed, names.SERVING) or _not_ready(kind, deployment, pods, summary)


def _rolling(kind: str, deployment: Child | None, pods: tuple[PodState, ...], summary: str) -> UndatedCondition | None:
    """Enough pods serve, but some have an older template: the new ones may be failing."""
    if deployment is None or deployment.status.get("updatedReplicas", 0) >= deployment.status.get("replicas", 0):
        return None
    failing = worst(pods)
    why = f"; {failing[0].name}: {failing[1].reason}: {failing[1].message}" if failing is not None else ""
    return _condition(kind, "True", "RollingOut", f"{summary}; rolling out the changed template{why}")


def _over_quota(kind: str, observed: Observed, part: str) -> UndatedCondition | None:
    """False with QuotaExceeded if a ResourceQuota refused an object of the part."""
    of_part = {names.child(observed.name, part), *([observed.name] if part == names.SERVING else [])}
    for refusal in observed.refusals:
        if refusal.reason == "QuotaExceeded" and refusal.ref.name in of_part:
            return _condition(kind, "False", refusal.reason, f"{'/'.join(refusal.ref)}: {refusal.message}")
    return None


def desired_replicas(observed: Observed) -> int:
    """Desired number of inference pods; an autoscaler of the Deployment overrides the spec."""
    deployment = observed.child("Deployment", names.SERVING)
    if observed.speculator.spec.suspend:
        return 0
    if deployment is not None and deployment.is_scaled_by_others:
        return int(deployment.live()["spec"].get("replicas", 1))
    return observed.speculator.spec.serving.replicas


def _not_ready(kind: str, workload: Child | None, pods: tuple[PodState, ...], summary: str) -> UndatedCondition:
    failing = worst(pods)
    if failing is not None:
        pod, problem = failing
        return _condition(kind, "False", problem.reason, f"{summary}; {pod.name}: {problem.message}")
    if workload is not None:
        for condition in workload.status.get("conditions", ()):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                return _condition(kind, "False", "QuotaExceeded", f"{summary}; {condition.get('message', '')}")
    if any(not pod.is_ready for pod in pods) or not pods:
        return _condition(kind, "False", "ModelLoading", f"{summary}; the others are starting")
    return _condition(kind, "False", "RollingOut", summary)


def _registry_ready(observed: Observed) -> UndatedCondition:
    kind, view = "RegistryReady", observed.registry
    if view.connection is ConnectionState.CONNECTED:
        return _condition(kind, "True", "Connected", "connected to the registry")
    if view.connection is ConnectionState.CONNECTING and (before := _before(observed, kind)):
        return _condition(kind, *before)
    pods = observed.pods_of(names.REGISTRY)
    failing = worst(pods)
    if failing is not None and not any(pod.is_ready for pod in pods):
        pod, problem = failing
        return _condition(kind, "False", problem.reason, f"{pod.name}: {problem.message}")
    connection = ConnectionState.STARTING if view.connection is ConnectionState.CONNECTING else view.connection
    not_connected = _condition(kind, "False", connection.value, view.problem or "the registry's pod is not ready yet")
    return _over_quota(kind, observed, names.REGISTRY) or not_connected


def _trainer_ready(observed: Observed) -> UndatedCondition:
    kind, spec = "TrainerReady", observed.speculator.spec
    if not spec.traces.enabled:
        return _condition(kind, "False", "Disabled", "spec.traces.enabled is false, so there is no training data")
    if not has_redis(observed.speculator, observed.config):
        message = "the operator has no Redis and spec.traces.redis is not set, so nothing is captured"
        return _condition(kind, "False", "NoRedis", message)
    if spec.suspend or spec.trainer.suspend:
        return _condition(
            kind, "False", "Suspended", "the trainer is suspended; serving continues with the current draft"
        )
    pods = observed.pods_of(names.TRAINER)
    if any(pod.is_ready for pod in pods):
        return _condition(kind, "True", "Training", "the trainer is running")
    failing = worst(pods)
    if failing is not None:
        pod, problem = failing
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
        return _condition(kind, "False", "CaptureUnavailable", f"no traces from pod {state.capture_problem}")
    return _condition(kind, "True", "Adapting", "drafts are trained on live traffic")


def _speculation(observed: Observed) -> UndatedCondition:
    status, reason, message = next(_of_speculation(observed))
    return _condition("SpeculationEffective", status, reason, message)


def _of_speculation(observed: Observed) -> Iterator[Assessment]:
    state, spec = observed.registry.state, observed.speculator.spec
    if spec.suspend:
        yield "Unknown", "Suspended", "spec.suspend is true"
    if spec.draft.lookahead == 0:
        yield "False", "SpeculationDisabled", "spec.draft.lookahead is 0"
    before = _before(observed, "SpeculationEffective")
    if state is None and before is not None and before[1] not in _OF_THE_SPEC:
        yield before
    if state is None or not state.stable:
        yield "Unknown", "NoDraft", "no draft serves yet: each step yields one token, or more with n-gram lookup"
        return
    num_without = state.pods.connected - state.pods.serving_stable - state.pods.serving_candidate
    if num_without > 0:
        message = f"{num_without} of {state.pods.connected} pods have not loaded version {state.stable} yet"
        yield "False", "DraftNotLoaded", message
    length, steps = acceptance_length(state, state.stable)
    if length is None or steps < _ENOUGH_STEPS:
        yield "Unknown", "TooFewSamples", "not enough traffic yet to measure acceptance"
        return
    if length < _COLLAPSED:
        yield "False", "AcceptanceCollapsed", _COLLAPSED_MESSAGE
    yield "True", "Effective", "drafts are accepted"


def _progressing(observed: Observed) -> UndatedCondition:
    status, reason, message = next(_of_progress(observed))
    return _condition("Progressing", status, reason, message)


def _of_progress(observed: Observed) -> Iterator[Assessment]:
    state, rollout = observed.registry.state, observed.speculator.spec.rollout
    before = _before(observed, "Progressing")
    if state is None and before is not None:
        yield before
    if state is None or not state.latest:
        yield "Unknown", "NoVersion", "no draft has been published yet"
        return
    if rollout.pinned_version is not None and state.HasField("pinned") and state.pinned == rollout.pinned_version:
        yield "False", "Pinned", f"version {rollout.pinned_version} is pinned; newer versions are held"
    if rollout.paused:
        yield "False", "Paused", "spec.rollout.paused is true"
    if state.candidate:
        yield _of_canary(state)
    waiting = [version.version for version in observed.registry.versions if version.phase in _WAITING]
    if waiting and rollout.strategy is Strategy.MANUAL:
        yield "False", "Waiting", f"version {max(waiting)} is waiting for spec.rollout.promotedVersion"
    if waiting:
        yield "True", "Waiting", f"version {max(waiting)} is waiting for its rollout"
    yield "True", "Complete", f"version {state.stable} is serving" if state.stable else "no draft is serving"


def _before(observed: Observed, kind: str) -> Assessment | None:
    """The previous assessment. It is kept until the registry has sent its state to this process."""
    for condition in observed.speculator.status.conditions:
        if condition.type == kind:
            return condition.status, condition.reason, condition.message
    return None


def _of_canary(state: pb.SpeculatorState) -> Assessment:
    """A canary that continues after its deadline or its verdict waits for a person."""
    if ASKS_A_PERSON in state.message:
        decide = f"promote version {state.candidate}, or pin another one"
        if "no verdict" in state.message:
            return "False", "Inconclusive", f"no verdict at the deadline; {decide}"
        return "False", "CanaryFailed", f"the canary failed, and spec.rollout.autoRollback is false; {decide}"
    return "True", "Canary", f"version {state.candidate} is in canary"


def _condition(kind: str, status: ConditionStatus, reason: str, message: str) -> UndatedCondition:
    return UndatedCondition(type=kind, status=status, reason=reason, message=message[:2000])

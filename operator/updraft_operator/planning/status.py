"""The status of a speculator, derived entirely from what was observed."""

from datetime import datetime

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.status import (
    MAX_DOMAINS,
    AcceptanceStatus,
    Condition,
    DomainStatus,
    LastFailure,
    PhaseStatus,
    ProgressStatus,
    RolloutStatus,
    RuntimeStatus,
    ServingStatus,
    Status,
    TrainerStatus,
    VersionsStatus,
)
from updraft_operator.manifests.tls import port
from updraft_operator.planning.assessment import Assessment, dated
from updraft_operator.planning.conditions import conditions
from updraft_operator.planning.observed import (
    Observed,
    acceptance_length,
    domain_lengths,
    is_trained,
    learning_of,
    moment_ms,
    phase_name,
)
from updraft_operator.planning.runtime.upgrade import Upgrade
from updraft_operator.planning.serving.availability import desired_pods, reached_pods

_OTHER = "other"
"""The domain of all traffic outside the largest ones."""

_TRAINER_STATES = {name: name for name in ("Training", "Starting", "Suspended", "Disabled")} | {
    "WaitingForRanks": "Starting",
}


def status(observed: Observed, now: datetime, upgrade: Upgrade | None = None) -> Status:
    """Without `upgrade`, it says about the runtime what it said."""
    before, generation = observed.speculator.status, observed.speculator.metadata.generation
    assessments = conditions(observed, None if upgrade is None else upgrade.says)
    state = observed.registry.state
    return Status(
        observed_generation=generation,
        versions=_versions(state) if state is not None else before.versions,
        rollout=_rollout(observed, state) if state is not None else before.rollout,
        serving=_serving(observed, assessments["Available"]),
        acceptance=_acceptance(state) or before.acceptance,
        trainer=_trainer(observed, assessments["TrainerReady"]),
        last_failure=_last_failure(observed) or before.last_failure,
        runtime=before.runtime if upgrade is None else _runtime(observed, upgrade),
        conditions=dated(assessments, before.conditions, generation, now),
    )


def _runtime(observed: Observed, upgrade: Upgrade) -> RuntimeStatus:
    before = observed.speculator.status.runtime
    ended = upgrade.ended or (before.last_update_time if before is not None else None)
    return RuntimeStatus(current=upgrade.current, available=observed.config.runtime, last_update_time=ended)


def without_measurements(current: Status) -> Status:
    """The status without the values that change with every request."""
    rollout = current.rollout.model_copy(update={"message": None}) if current.rollout else None
    trainer = current.trainer.model_copy(update={"message": None}) if current.trainer else None
    if trainer is not None and (progress := trainer.progress) is not None:
        device_only = ProgressStatus(device=progress.device, ranks=progress.ranks)
        trainer = trainer.model_copy(update={"progress": device_only})
    conditions = [
        condition.model_copy(update={"message": ""}) if _is_measured(condition) else condition
        for condition in current.conditions
    ]
    measured = {"acceptance": None, "rollout": rollout, "trainer": trainer, "conditions": conditions}
    return current.model_copy(update=measured)


def _is_measured(condition: Condition) -> bool:
    return condition.type in ("Adapting", "Sized") or condition.reason == "MovingTraces"


def _versions(state: pb.SpeculatorState) -> VersionsStatus:
    return VersionsStatus(
        stable=state.stable or None,
        candidate=state.candidate or None,
        previous=state.previous or None,
        latest=state.latest or None,
    )


def _rollout(observed: Observed, state: pb.SpeculatorState) -> RolloutStatus:
    number = state.candidate or state.latest
    phases = {version.version: phase_name(version.phase).value for version in observed.registry.versions}
    running = state.rollout if state.HasField("rollout") else None
    return RolloutStatus(
        phase=phases.get(number),
        version=number or None,
        baseline=running.baseline if running else None,
        step=running.step + 1 if running else None,
        steps=running.steps if running else None,
        start_time=moment_ms(running.started_unix_ms) if running else None,
        step_start_time=moment_ms(running.step_since_unix_ms) if running else None,
        message=state.message[:1024],
    )


def _serving(observed: Observed, serves: Assessment) -> ServingStatus:
    """All pods are counted from one watch: the Deployment's own numbers may be older than its pods."""
    state = observed.registry.state
    pods = [pod for pod in observed.pods_of(names.SERVING) if not pod.is_ending]
    before = observed.speculator.status.serving
    updated = before.updated_replicas if before is not None else None
    attached = observed.speculator.spec.serving.attached
    selector = names.selector(observed.name, names.SERVING) if attached is None else attached.selector.match_labels
    url = port.url(observed.speculator) if attached is None else None
    return ServingStatus(
        replicas=sum(not pod.is_finished for pod in pods),
        desired_replicas=desired_pods(observed),
        ready_replicas=sum(pod.is_ready for pod in pods),
        updated_replicas=state.pods.serving_stable if state is not None else updated,
        failed_replicas=sum(pod.problem is not None for pod in pods),
        reached_replicas=reached_pods(observed, serves),
        selector=",".join(f"{name}={value}" for name, value in sorted(selector.items())),
        url=url,
    )


def _acceptance(state: pb.SpeculatorState | None) -> AcceptanceStatus | None:
    if state is None:
        return None
    stable, steps = acceptance_length(state, state.stable)
    candidate, _ = acceptance_length(state, state.candidate)
    speedup = state.speedup if state.HasField("speedup") else None
    if stable is None and candidate is None and speedup is None:
        return None
    return AcceptanceStatus(
        stable=decimal(stable),
        candidate=decimal(candidate),
        verify_steps=steps // 1000 * 1000,
        speedup=decimal(speedup and speedup.ratio),
        speedup_low=decimal(speedup and speedup.low),
        speedup_high=decimal(speedup and speedup.high),
        domains=_domains(state) or None,
    )


def _domains(state: pb.SpeculatorState) -> list[DomainStatus]:
    """The largest domains of the two versions, which may have none in common: callers name them."""
    stable, candidate = domain_lengths(state, state.stable), domain_lengths(state, state.candidate)
    found = {**stable, **candidate}
    rest = [_OTHER] if _OTHER in found else []
    of_callers = [name for name in found if name != _OTHER]
    return [
        DomainStatus(domain=name, stable=decimal(stable.get(name)), candidate=decimal(candidate.get(name)))
        for name in (*of_callers[: MAX_DOMAINS - len(rest)], *rest)
    ]


def _trainer(observed: Observed, ready: Assessment) -> TrainerStatus:
    trained = [version for version in observed.registry.versions if is_trained(version)]
    before = observed.speculator.status.trainer
    last, state = moment_ms(max((version.published_unix_ms for version in trained), default=0)), observed.registry.state
    return TrainerStatus(
        state=_TRAINER_STATES.get(ready.reason, "Failing"),
        last_publish_time=last or (before.last_publish_time if before else None),
        message=(state.trainer_message[:1024] or None) if state is not None else before.message if before else None,
        progress=_progress(learning) if (learning := learning_of(state)) is not None else None,
    )


def _progress(learning: pb.Learning) -> ProgressStatus:
    has_utilization = learning.HasField("flops_utilization")
    return ProgressStatus(
        device=learning.device[:1024] or None,
        ranks=learning.world_size or None,
        tokens_per_second=round(learning.tokens_per_second),
        flops_utilization_percent=round(100 * learning.flops_utilization) if has_utilization else None,
        phases=[PhaseStatus(phase=one.phase, percent=round(100 * one.share)) for one in learning.phases] or None,
        steps_to_estimate=learning.steps_to_estimate,
        estimate_time=moment_ms(learning.estimate_due_unix_ms),
        last_save_time=moment_ms(learning.last_save_unix_ms),
    )


def _last_failure(observed: Observed) -> LastFailure | None:
    lost = [version for version in observed.registry.versions if phase_name(version.phase).is_condemned]
    last = max(lost, key=lambda version: (version.phase_since_unix_ms, version.version), default=None)
    at = moment_ms(last.phase_since_unix_ms) if last is not None else None
    if last is None or at is None:
        return None
    reason = phase_name(last.phase).value
    return LastFailure(version=last.version, reason=reason, message=last.reason[:1024], time=at)


def decimal(length: float | None) -> str | None:
    return None if length is None else f"{length:.2f}"

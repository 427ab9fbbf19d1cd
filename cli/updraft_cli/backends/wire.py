"""The registry's messages as plain values."""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts.sizing import registry_limit, registry_needs
from updraft_chassis.tenants import hashes
from updraft_cli.backends.drafts import (
    Acceptance,
    DomainAcceptance,
    Draft,
    DraftDetails,
    DraftList,
    HistoryEntry,
    OfflineEvaluation,
    Provenance,
    Tenant,
    TenantList,
    Tensor,
)
from updraft_cli.backends.policy import Policy
from updraft_cli.backends.snapshot import PodDetails, PodState
from updraft_cli.backends.speculators import (
    ROLES,
    DomainChange,
    Learning,
    MetricChange,
    Pace,
    Pods,
    ServedVersion,
    Speculator,
    Speedup,
    TrafficKind,
    TrafficShift,
    Trial,
)

_LAST_MS = 253_402_300_799_000
"""The last second of the year 9999."""


def draft_list(speculator: str, response: pb.ListResponse) -> DraftList:
    state = next((s for s in response.speculators if s.speculator == speculator), pb.SpeculatorState())
    return DraftList(
        speculator=speculator,
        stable=state.stable,
        candidate=state.candidate,
        pinned=pinned(state),
        message=state.message,
        drafts=tuple(draft(version, state) for version in response.versions),
    )


def draft(version: pb.Version, state: pb.SpeculatorState | None = None) -> Draft:
    """Return one version; `state` adds its live acceptance, and whether it is pinned."""
    manifest = version.manifest
    return Draft(
        speculator=manifest.speculator,
        version=version.version,
        phase=phase(version.phase),
        since=time(version.phase_since_unix_ms),
        reason=version.reason,
        source=word(pb.Source.Name(manifest.source)),
        parent=manifest.parent_version,
        samples=manifest.provenance.samples,
        step=manifest.provenance.step,
        size_bytes=manifest.size_bytes,
        digest=manifest.digest,
        published=time(version.published_unix_ms),
        pinned=state is not None and version.version == pinned(state),
        retained=version.retain,
        pruned=version.pruned,
        acceptance=acceptance_of(version.version, state.traffic if state else ()),
    )


def draft_details(
    version: pb.Version, state: pb.SpeculatorState | None = None, history: Sequence[pb.Transition] = ()
) -> DraftDetails:
    """Return all facts about one version; `version` comes from Get, with tensors and samples."""
    manifest, provenance = version.manifest, version.manifest.provenance
    return DraftDetails(
        draft=draft(version, state),
        speculator=manifest.speculator,
        target_fingerprint=manifest.target_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        draft_vocabulary_fingerprint=manifest.draft_vocabulary_fingerprint,
        tensors_digest=manifest.tensors_digest,
        provenance=Provenance(
            first_trace=provenance.first_trace_id,
            last_trace=provenance.last_trace_id,
            config_digest=provenance.config_digest,
            code_version=provenance.code_version,
            origin=provenance.origin,
            learning_rate=provenance.learning_rate,
            tenants=tuple(map(hashes.text, provenance.tenants)),
            has_more_tenants=provenance.has_more_tenants,
        ),
        config=manifest.config_json,
        evaluation=_evaluation(manifest),
        tensors=tuple(
            Tensor(name=spec.name, dtype=spec.dtype, shape=tuple(spec.shape), digest=spec.digest)
            for spec in manifest.tensors
        ),
        history=tuple(map(history_entry, history)),
    )


def tenant_list(speculator: str, tenants: Iterable[pb.Tenant], incomplete: Iterable[int]) -> TenantList:
    return TenantList(
        speculator=speculator,
        tenants=tuple(
            Tenant(
                hash=hashes.text(tenant.hash),
                versions=tuple(tenant.versions),
                forgotten=time(tenant.forgotten_unix_ms) if tenant.forgotten_unix_ms else None,
                deleted=tenant.is_deleted,
            )
            for tenant in tenants
        ),
        incomplete_versions=tuple(incomplete),
    )


def history_entry(transition: pb.Transition) -> HistoryEntry:
    return HistoryEntry(
        time=time(transition.unix_ms),
        version=transition.version,
        before=phase(transition.from_phase),
        phase=phase(transition.to_phase),
        reason=transition.reason,
        actor=transition.actor,
    )


def speculator(state: pb.SpeculatorState, versions: Sequence[pb.Version] = ()) -> Speculator:
    """Return a state; `versions` add the phases of the versions in its traffic."""
    phases = {version.version: phase(version.phase) for version in versions}
    served = ((counted.version, acceptance_of(counted.version, state.traffic)) for counted in state.traffic)
    return Speculator(
        name=state.speculator,
        message=state.message,
        **{role: getattr(state, role) for role in ROLES},
        pinned=pinned(state),
        pin_reason=state.pin_reason,
        paused=state.paused,
        pause_reason=state.pause_reason,
        pods=Pods(
            connected=state.pods.connected,
            serving_stable=state.pods.serving_stable,
            serving_candidate=state.pods.serving_candidate,
            failed=state.pods.failed,
        ),
        acceptance=acceptance_of(state.stable, state.traffic),
        domains=_domains(state),
        speedup=_speedup(state.speedup) if state.HasField("speedup") else None,
        trial=_trial(state.rollout) if state.HasField("rollout") else None,
        policy=Policy.from_proto(state.policy),
        traffic=tuple(
            ServedVersion(
                version=version, phase=phases.get(version, "") if version else "no draft", acceptance=acceptance
            )
            for version, acceptance in served
            if acceptance is not None
        ),
        capture_problem=state.capture_problem,
        trainer_message=state.trainer_message,
        learning=_learning(state) if state.HasField("learning") else None,
        pace=_pace(state.learning) if state.HasField("learning") else None,
        too_small=_too_small(state, versions),
    )


def _too_small(state: pb.SpeculatorState, versions: Sequence[pb.Version]) -> str:
    """The first sentence about something too small, in the order of condition Sized."""
    return (
        state.learning.too_small
        or registry_limit(state.max_draft_bytes, state.learning.version_bytes)
        or _registry_volume(state, versions)
        or state.capture_too_small
    )


def _registry_volume(state: pb.SpeculatorState, versions: Sequence[pb.Version]) -> str:
    published = max((version.manifest.size_bytes for version in versions), default=0)
    _, problem = registry_needs(state.volume_bytes, published or state.learning.version_bytes)
    return f"{problem}: move UPDRAFT_REGISTRY_DATA_DIR to a larger disk" if problem else ""


def _learning(state: pb.SpeculatorState) -> Learning:
    done = state.learning
    return Learning(
        samples=done.samples,
        held_out=done.held_out,
        steps=done.steps,
        estimates=done.estimates,
        loss=done.loss if done.HasField("loss") else None,
        held_out_length=_change(done.held_out_length) if done.HasField("held_out_length") else None,
        trained_length=done.trained_length if done.HasField("trained_length") else None,
        lag_s=done.lag_seconds if done.HasField("lag_seconds") else None,
        demand_tokens_per_s=state.demand_tokens_per_second if state.HasField("demand_tokens_per_second") else None,
        granted_tokens_per_s=state.granted_tokens_per_second if state.HasField("granted_tokens_per_second") else None,
        kinds=tuple(map(_kind, done.kinds)),
        shifts=tuple(
            TrafficShift(time=time(shift.unix_ms), before=shift.before, after=shift.after) for shift in done.shifts
        ),
    )


def _kind(kind: pb.TrafficKind) -> TrafficKind:
    return TrafficKind(
        name=kind.name,
        samples=kind.samples,
        held_out=kind.held_out,
        last_hour=kind.last_hour,
        last_day=kind.last_day,
        recent_share=kind.recent_share,
        candidate_length=kind.candidate_length or None,
        stable_length=kind.stable_length or None,
    )


def _pace(done: pb.Learning) -> Pace:
    return Pace(
        device=done.device,
        ranks=done.world_size,
        tokens_per_second=done.tokens_per_second,
        utilization=done.flops_utilization if done.HasField("flops_utilization") else None,
        shares={one.phase: one.share for one in done.phases},
        steps_to_estimate=done.steps_to_estimate,
        estimate_due=time(done.estimate_due_unix_ms) if done.estimate_due_unix_ms else None,
        last_save=time(done.last_save_unix_ms) if done.last_save_unix_ms else None,
    )


def _speedup(measured: pb.Speedup) -> Speedup:
    return Speedup(ratio=measured.ratio, low=measured.low, high=measured.high)


def acceptance_of(version: int, traffic: Sequence[pb.VersionTraffic]) -> Acceptance | None:
    """Return the live acceptance of a version, or None before its first verify step."""
    for counted in traffic:
        if counted.version == version and counted.verify_steps:
            return Acceptance(
                verify_steps=counted.verify_steps,
                tokens=counted.tokens,
                length=counted.tokens / counted.verify_steps,
                by_position=_rates(counted.accepted_by_position, counted.proposed_by_position),
                by_lookahead=_lookaheads(counted),
            )
    return None


def _domains(state: pb.SpeculatorState) -> tuple[DomainAcceptance, ...]:
    lengths = {
        counted.version: {one.domain: one.tokens / one.verify_steps for one in counted.domains if one.verify_steps}
        for counted in state.traffic
        if counted.version
    }
    stable, candidate = lengths.get(state.stable, {}), lengths.get(state.candidate, {})
    return tuple(
        DomainAcceptance(domain=name, stable=stable.get(name), candidate=candidate.get(name))
        for name in {**stable, **candidate}
    )


def pinned(state: pb.SpeculatorState) -> int | None:
    """Return the pinned version (0: no draft), or None while nothing is pinned."""
    return state.pinned if state.HasField("pinned") else None


def phase(value: "pb.Phase.ValueType") -> str:
    """Return a phase in words: `stable`, `rolled back`; empty for none."""
    return "" if value == pb.PHASE_UNSPECIFIED else word(pb.Phase.Name(value))


def word(constant: str) -> str:
    """Turn PHASE_ROLLED_BACK into `rolled back`."""
    return constant.partition("_")[2].replace("_", " ").lower()


def time(unix_ms: int) -> datetime:
    """Return the nearest time that the calendar has: an earlier registry takes any number from a trainer."""
    return datetime.fromtimestamp(min(max(unix_ms, 0), _LAST_MS) / 1000, UTC)


def _rates(accepted: Sequence[int], proposed: Sequence[int]) -> tuple[float, ...]:
    """Return accepted over proposed by position; `accepted` may end after the last accepted position."""
    padded = (*accepted, *([0] * len(proposed)))
    return tuple(hits / total for hits, total in zip(padded, proposed, strict=False) if total)


def _lookaheads(counted: pb.VersionTraffic) -> tuple[float, ...]:
    """Return the share of steps with 0, 1, ... draft tokens. A step with n of them has one at each of the first n positions.

    Empty if the positions are not of these steps: not all engines tell them.
    """
    at_least = [counted.verify_steps, *counted.proposed_by_position, 0]
    is_partial = counted.tokens > sum(at_least)  # a step yields one token more than it accepts
    if is_partial or any(some < more for some, more in pairwise(at_least)):
        return ()
    return tuple((some - more) / counted.verify_steps for some, more in pairwise(at_least))


def _evaluation(manifest: pb.Manifest) -> OfflineEvaluation | None:
    """For the traffic of its time, as the gate saw it; earlier trainers gave no weights."""
    samples = manifest.evaluation.samples
    has_weights = any(sample.weight for sample in samples)
    weighed = [(sample, sample.weight if has_weights else 1.0) for sample in samples]
    candidate_steps = sum(weight * sample.candidate_steps for sample, weight in weighed)
    baseline_steps = sum(weight * sample.baseline_steps for sample, weight in weighed)
    if not candidate_steps or not baseline_steps:
        return None
    tokens = sum(weight * sample.tokens for sample, weight in weighed)
    return OfflineEvaluation(
        requests=sum(weight > 0 for _, weight in weighed),
        lookahead=manifest.evaluation.lookahead,
        baseline_version=manifest.evaluation.baseline_version,
        baseline_length=tokens / baseline_steps,
        candidate_length=tokens / candidate_steps,
    )


def _trial(rollout: pb.Rollout) -> Trial:
    has_acceptance, has_latency = rollout.HasField("acceptance_length"), rollout.HasField("inter_token_latency")
    return Trial(
        candidate=rollout.candidate,
        baseline=rollout.baseline,
        comparison=word(pb.Comparison.Name(rollout.comparison)),
        step=rollout.step + 1,
        steps=rollout.steps,
        pods_percent=rollout.pods_percent,
        started=time(rollout.started_unix_ms),
        step_since=time(rollout.step_since_unix_ms),
        paused_s=rollout.paused_ms / 1000,
        verdict=word(pb.Verdict.Name(rollout.verdict)),
        acceptance_length=_change(rollout.acceptance_length) if has_acceptance else None,
        inter_token_latency_s=_change(rollout.inter_token_latency) if has_latency else None,
        requests=rollout.candidate_requests,
        slices=rollout.slices,
        failures=rollout.failures,
        evidence=rollout.evidence,
        domains=tuple(map(_domain, rollout.domains)),
    )


def _domain(one: pb.DomainEstimate) -> DomainChange:
    change = _change(one.acceptance_length) if one.HasField("acceptance_length") else None
    return DomainChange(domain=one.domain, acceptance_length=change)


def _change(estimate: pb.Estimate) -> MetricChange:
    """Without enough observations the registry sends the bounds -100 and infinity."""
    has_bounds = math.isfinite(estimate.high_percent)
    return MetricChange(
        candidate=estimate.candidate,
        stable=estimate.stable,
        change_percent=estimate.change_percent,
        low_percent=estimate.low_percent if has_bounds else None,
        high_percent=estimate.high_percent if has_bounds else None,
    )


def pod(state: pb.PodState) -> PodState:
    return PodState(
        name=state.pod,
        state=_pod_state(state),
        problem=state.problem or ("its server has to restart to load it" if state.waits_for_restart else ""),
        version=state.loaded,
        digest=state.tensors_digest,
        prefetched=tuple(state.prefetched_versions),
        engine=state.engine,
        device=state.device,
        last_report=time(state.last_report_unix_ms),
        running_requests=state.running_requests,
        swaps=state.swaps,
        refused_swaps=state.refused_swaps,
        swap_pause_s=state.swap_pause_seconds,
    )


def pod_details(state: pb.PodState) -> PodDetails:
    served = ((counted.version, acceptance_of(counted.version, state.traffic)) for counted in state.traffic)
    return PodDetails(
        pod=pod(state),
        traffic=tuple(
            ServedVersion(version=version, phase="", acceptance=acceptance)
            for version, acceptance in served
            if acceptance is not None
        ),
        speedup=_speedup(state.speedup) if state.HasField("speedup") else None,
        capture_problem=state.capture_problem,
    )


def _pod_state(state: pb.PodState) -> str:
    if not state.connected:
        return "disconnected"
    if state.draining:
        return "draining"
    if state.refused:
        return "failed"
    return "waiting" if state.waits_for_restart or state.problem else "connected"

"""Protobuf to domain and back: the one place that knows both."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import TypeVar

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry.rollout.canary import Scene
from updraft_registry.rollout.gate.live import Estimate
from updraft_registry.rollout.placement import Order, Switchback
from updraft_registry.rollout.policy import problem
from updraft_registry.rollout.version import (
    NO_DRAFT,
    Analysis,
    Comparison,
    Evaluation,
    EvaluationSample,
    GatePolicy,
    OnInconclusive,
    Phase,
    Policy,
    Source,
    Speculator,
    Step,
    Strategy,
    Transition,
    Version,
    newest_proven,
    stable,
)

E = TypeVar("E", bound=Enum)

_SOURCES = {
    registry_pb2.SOURCE_INITIAL: Source.INITIAL,
    registry_pb2.SOURCE_TRAINER: Source.TRAINER,
    registry_pb2.SOURCE_IMPORTED: Source.IMPORTED,
}
_STRATEGIES: Mapping[int, Strategy] = {
    registry_pb2.Strategy.Value(f"STRATEGY_{strategy.name}"): strategy for strategy in Strategy
}
_ON_INCONCLUSIVE: Mapping[int, OnInconclusive] = {
    registry_pb2.OnInconclusive.Value(f"ON_INCONCLUSIVE_{outcome.name}"): outcome for outcome in OnInconclusive
}
_COMPARISONS_BACK = {
    Comparison.AUTO: registry_pb2.COMPARISON_UNSPECIFIED,
    Comparison.PODS: registry_pb2.COMPARISON_PODS,
    Comparison.SWITCHBACK: registry_pb2.COMPARISON_SWITCHBACK,
}
_COMPARISONS: Mapping[int, Comparison] = {number: comparison for comparison, number in _COMPARISONS_BACK.items()}
_PHASES = {phase: registry_pb2.Phase.Value(f"PHASE_{phase.name}") for phase in Phase}
_PHASES_BACK = {number: phase for phase, number in _PHASES.items()}


def phase_to_proto(phase: Phase | None) -> registry_pb2.Phase.ValueType:
    """The wire's phase; None is unspecified."""
    return registry_pb2.PHASE_UNSPECIFIED if phase is None else _PHASES[phase]


def pending(manifest: registry_pb2.Manifest, number: int, now_ms: int) -> Version:
    """The version that a manifest becomes when it is published."""
    by = _SOURCES[manifest.source]
    parent = f", trained from version {manifest.parent_version}" if manifest.parent_version else ""
    return Version(
        number=number,
        digest=manifest.digest,
        tensors_digest=manifest.tensors_digest,
        source=by,
        phase=Phase.PENDING,
        reason=f"published ({by}{parent})",
        published_ms=now_ms,
        since_ms=now_ms,
        evaluation=_evaluation(manifest),
    )


def version_from_proto(message: registry_pb2.Version) -> Version:
    """The domain's view of a stored document."""
    phase = _PHASES_BACK.get(message.phase, Phase.PENDING)
    return replace(
        pending(message.manifest, message.version, message.published_unix_ms),
        phase=phase,
        reason=message.reason,
        since_ms=message.phase_since_unix_ms,
        is_retained=message.retain,
    )


def told_to_proto(version: Version, manifest: registry_pb2.Manifest, *, is_full: bool = True) -> registry_pb2.Version:
    """The version as callers are told it: also whether its weights are gone, which no document says."""
    message = version_to_proto(version, manifest, is_full=is_full)
    message.pruned = not version.is_kept
    return message


def version_to_proto(
    version: Version, manifest: registry_pb2.Manifest, *, is_full: bool = True
) -> registry_pb2.Version:
    """The wire's version; without `is_full` the manifest comes without tensors, samples and config."""
    message = registry_pb2.Version(
        version=version.number,
        manifest=manifest,
        phase=phase_to_proto(version.phase),
        reason=version.reason,
        published_unix_ms=version.published_ms,
        phase_since_unix_ms=version.since_ms,
        retain=version.is_retained,
    )
    if not is_full:
        message.manifest.ClearField("tensors")
        message.manifest.ClearField("config_json")
        message.manifest.evaluation.ClearField("samples")
    return message


def policy_from_proto(document: registry_pb2.RolloutPolicy, defaults: Policy) -> Policy:
    """What this registry acts on: what is left open comes from `defaults`, and InvalidInput says what cannot be."""
    policy = Policy(
        strategy=_chosen("strategy", document.strategy, _STRATEGIES, defaults.strategy),
        steps=tuple(Step(pods_percent=step.pods_percent, hold_s=step.hold_seconds) for step in document.steps)
        or defaults.steps,
        analysis=_analysis(document.analysis, defaults.analysis),
        auto_rollback=document.auto_rollback if document.HasField("auto_rollback") else defaults.auto_rollback,
        progress_deadline_s=document.progress_deadline_seconds or defaults.progress_deadline_s,
        max_pods_swapping=document.max_pods_swapping
        if document.HasField("max_pods_swapping")
        else defaults.max_pods_swapping,
        gate=_gate(document.offline_gate, defaults.gate),
        history_limit=document.revision_history_limit or defaults.history_limit,
    )
    wrong = problem(policy)
    if wrong:
        raise InvalidInput(wrong)
    return policy


def policy_to_proto(policy: Policy) -> registry_pb2.RolloutPolicy:
    """The whole policy, with what was left open."""
    analysis = policy.analysis
    return registry_pb2.RolloutPolicy(
        strategy=registry_pb2.Strategy.Value(f"STRATEGY_{policy.strategy.name}"),
        steps=[
            registry_pb2.RolloutStep(pods_percent=step.pods_percent, hold_seconds=step.hold_s) for step in policy.steps
        ],
        analysis=registry_pb2.Analysis(
            interval_seconds=analysis.interval_s,
            min_samples=analysis.min_samples,
            failure_limit=analysis.failure_limit,
            max_acceptance_regression_percent=analysis.max_acceptance_regression_percent,
            max_latency_regression_percent=analysis.max_latency_regression_percent,
            on_inconclusive=registry_pb2.OnInconclusive.Value(f"ON_INCONCLUSIVE_{analysis.on_inconclusive.name}"),
            dry_run=analysis.dry_run,
            confidence=analysis.confidence,
            comparison=_COMPARISONS_BACK[analysis.comparison],
            switchback_seconds=analysis.switchback_s,
        ),
        auto_rollback=policy.auto_rollback,
        progress_deadline_seconds=policy.progress_deadline_s,
        max_pods_swapping=policy.max_pods_swapping,
        revision_history_limit=policy.history_limit,
        offline_gate=registry_pb2.OfflineGate(
            min_samples=policy.gate.min_samples,
            min_gain_percent=policy.gate.min_gain_percent,
            confidence=policy.gate.confidence,
        ),
    )


def state_to_proto(
    speculator: Speculator,
    scene: Scene | None,
    message: str,
    *,
    pods: registry_pb2.Pods,
    traffic: Sequence[registry_pb2.VersionTraffic],
) -> registry_pb2.SpeculatorState:
    """The whole state of a speculator."""
    serving, lineage, wish = stable(speculator.versions), speculator.lineage, speculator.wish
    number = serving.number if serving else NO_DRAFT
    previous = newest_proven(speculator.versions, other_than=number)
    state = registry_pb2.SpeculatorState(
        speculator=speculator.name,
        stable=number,
        candidate=scene.rollout.candidate if scene else NO_DRAFT,
        previous=previous.number if previous else NO_DRAFT,
        latest=speculator.latest,
        pinned=wish.pinned,
        pin_reason=wish.pin_reason,
        paused=wish.is_paused,
        pause_reason=wish.pause_reason,
        policy=policy_to_proto(wish.policy),
        pods=pods,
        traffic=traffic,
        message=message,
        target_fingerprint=lineage.target_fingerprint if lineage else "",
        draft_vocabulary_fingerprint=lineage.draft_vocabulary_fingerprint if lineage else "",
    )
    if scene is not None:
        state.rollout.CopyFrom(_rollout(scene))
        state.step, state.step_since_unix_ms = scene.step, scene.rollout.step_since_ms
    return state


def _rollout(scene: Scene) -> registry_pb2.Rollout:
    """The canary that runs."""
    rollout, judgement, step = scene.rollout, scene.judgement, scene.step
    return registry_pb2.Rollout(
        candidate=rollout.candidate,
        baseline=rollout.baseline,
        comparison=_COMPARISONS_BACK[rollout.comparison],
        step=step,
        steps=len(scene.policy.steps),
        pods_percent=scene.policy.steps[step].pods_percent,
        started_unix_ms=rollout.started_ms,
        step_since_unix_ms=rollout.step_since_ms,
        paused_ms=rollout.paused_ms,
        verdict=registry_pb2.Verdict.Value(f"VERDICT_{judgement.verdict.name}"),
        acceptance_length=_estimate(judgement.acceptance),
        inter_token_latency=_estimate(judgement.latency),
        candidate_requests=rollout.evidence.candidate_requests,
        slices=rollout.evidence.slices,
        failures=rollout.evidence.failures,
        evidence=judgement.reason,
    )


def transition_to_proto(transition: Transition) -> registry_pb2.Transition:
    """One line of the history."""
    return registry_pb2.Transition(
        unix_ms=transition.at_ms,
        version=transition.number,
        from_phase=phase_to_proto(transition.before),
        to_phase=phase_to_proto(transition.after),
        reason=transition.reason,
        actor=transition.actor,
    )


def directive(order: Order, *, num_pods: int = 1) -> fleet_pb2.Directive:
    """The message of an order, which `num_pods` may be given at the same time.

    Its nonce is its content: a restarted registry repeats it, and no pod moves.
    """
    message = fleet_pb2.Directive(
        serve_version=order.serve,
        serve_digest=order.digest,
        prefetch_versions=order.prefetch,
        serve_phase=phase_to_proto(order.phase),
        reason=order.reason,
    )
    if order.switchback is not None:
        message.switchback.CopyFrom(_switchback(order.switchback))
    message.nonce = hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()[:16]
    message.prefetch_spread_ms = PREFETCH_SPREAD_MS * num_pods
    return message


PREFETCH_SPREAD_MS = 5
"""A pod: a thousand come within five seconds, which is two hundred a second, and one comes at once."""


def _switchback(plan: Switchback) -> fleet_pb2.Switchback:
    return fleet_pb2.Switchback(
        version_a=plan.versions[0],
        version_b=plan.versions[1],
        digest_a=plan.digests[0],
        digest_b=plan.digests[1],
        slice_seconds=plan.slice_s,
        start_unix_ms=plan.start_ms,
    )


def _estimate(estimate: Estimate | None) -> registry_pb2.Estimate | None:
    """An estimate; None, so absent, before it has bounds."""
    if estimate is None or math.isinf(estimate.high_percent):
        return None
    return registry_pb2.Estimate(
        candidate=estimate.candidate,
        stable=estimate.stable,
        change_percent=estimate.change_percent,
        low_percent=estimate.low_percent,
        high_percent=estimate.high_percent,
    )


def _chosen(field: str, number: int, known: Mapping[int, E], default: E) -> E:
    """The value of an enum; 0 is the default."""
    if number == 0:
        return default
    if number not in known:
        raise InvalidInput(
            f"{field} is {number}; this registry knows {', '.join(value.name for value in known.values())}"
        )
    return known[number]


def _analysis(document: registry_pb2.Analysis, defaults: Analysis) -> Analysis:
    def counted(field: str, default: int) -> int:
        """A number for which 0 is a value like others."""
        return int(getattr(document, field)) if document.HasField(field) else default  # type: ignore[arg-type] # a name

    return Analysis(
        interval_s=document.interval_seconds or defaults.interval_s,
        min_samples=document.min_samples or defaults.min_samples,
        failure_limit=counted("failure_limit", defaults.failure_limit),
        max_acceptance_regression_percent=counted(
            "max_acceptance_regression_percent", defaults.max_acceptance_regression_percent
        ),
        max_latency_regression_percent=counted(
            "max_latency_regression_percent", defaults.max_latency_regression_percent
        ),
        on_inconclusive=_chosen(
            "analysis.on_inconclusive", document.on_inconclusive, _ON_INCONCLUSIVE, defaults.on_inconclusive
        ),
        dry_run=document.dry_run if document.HasField("dry_run") else defaults.dry_run,
        confidence=document.confidence or defaults.confidence,
        comparison=_chosen("analysis.comparison", document.comparison, _COMPARISONS, defaults.comparison),
        switchback_s=document.switchback_seconds or defaults.switchback_s,
    )


def _gate(document: registry_pb2.OfflineGate, defaults: GatePolicy) -> GatePolicy:
    has_gain = document.HasField("min_gain_percent")
    return GatePolicy(
        min_samples=document.min_samples or defaults.min_samples,
        min_gain_percent=document.min_gain_percent if has_gain else defaults.min_gain_percent,
        confidence=document.confidence or defaults.confidence,
    )


def _evaluation(manifest: registry_pb2.Manifest) -> Evaluation | None:
    if not manifest.HasField("evaluation"):
        return None
    return Evaluation(
        baseline_version=manifest.evaluation.baseline_version,
        lookahead=manifest.evaluation.lookahead,
        samples=tuple(
            EvaluationSample(
                trace_id=sample.trace_id,
                tokens=sample.tokens,
                candidate_steps=sample.candidate_steps,
                baseline_steps=sample.baseline_steps,
            )
            for sample in manifest.evaluation.samples
        ),
    )

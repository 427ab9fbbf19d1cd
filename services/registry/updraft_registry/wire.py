"""Protobuf to domain and back: the one place that knows both."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry.rollout import Order
from updraft_registry.version import (
    Evaluation,
    EvaluationSample,
    GatePolicy,
    Phase,
    Policy,
    Source,
    Strategy,
    Transition,
    Version,
)

_SOURCES = {
    registry_pb2.SOURCE_INITIAL: Source.INITIAL,
    registry_pb2.SOURCE_TRAINER: Source.TRAINER,
    registry_pb2.SOURCE_IMPORTED: Source.IMPORTED,
}
_STRATEGIES = {
    registry_pb2.STRATEGY_UNSPECIFIED: Strategy.IMMEDIATE,
    registry_pb2.STRATEGY_IMMEDIATE: Strategy.IMMEDIATE,
    registry_pb2.STRATEGY_MANUAL: Strategy.MANUAL,
}
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
        is_proven=phase is Phase.STABLE,
        is_retained=message.retain,
    )


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
    """What this registry acts on; InvalidInput for what it cannot do, rather than quietly doing something else."""
    if document.strategy not in _STRATEGIES:
        raise InvalidInput("this registry rolls out by strategy IMMEDIATE or MANUAL; it has no canaries yet")
    return Policy(
        strategy=_STRATEGIES[document.strategy],
        gate=_gate(document.offline_gate) if document.HasField("offline_gate") else defaults.gate,
        history_limit=document.revision_history_limit or defaults.history_limit,
    )


def policy_to_proto(policy: Policy, document: registry_pb2.RolloutPolicy) -> registry_pb2.RolloutPolicy:
    """The document that was set, completed with the values that were left open."""
    message = registry_pb2.RolloutPolicy()
    message.CopyFrom(document)
    message.strategy = registry_pb2.Strategy.Value(f"STRATEGY_{policy.strategy.name}")
    message.revision_history_limit = policy.history_limit
    message.offline_gate.min_samples = policy.gate.min_samples
    message.offline_gate.min_gain_percent = policy.gate.min_gain_percent
    message.offline_gate.confidence = policy.gate.confidence
    return message


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


def directive(order: Order) -> fleet_pb2.Directive:
    """The message of an order.

    Its nonce is its content: a restarted registry repeats it, and no pod moves.
    """
    message = fleet_pb2.Directive(
        serve_version=order.serve,
        serve_digest=order.digest,
        prefetch_versions=order.prefetch,
        serve_phase=phase_to_proto(order.phase),
        reason=order.reason,
    )
    message.nonce = hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()[:16]
    return message


def sum_traffic(reports: Iterable[fleet_pb2.PodReport]) -> list[registry_pb2.VersionTraffic]:
    """Counters by version over the pods' last reports, newest version first."""
    totals: dict[int, registry_pb2.VersionTraffic] = {}
    for counters in (counters for report in reports for counters in report.versions):
        total = totals.setdefault(counters.version, registry_pb2.VersionTraffic(version=counters.version))
        total.verify_steps += counters.verify_steps
        total.tokens += counters.tokens
        total.proposed += counters.proposed
        positions = total.accepted_by_position
        positions.extend([0] * (len(counters.accepted_by_position) - len(positions)))
        for position, accepted in enumerate(counters.accepted_by_position):
            positions[position] += accepted
    return [totals[number] for number in sorted(totals, reverse=True)]


def _gate(document: registry_pb2.OfflineGate) -> GatePolicy:
    if document.min_samples < 2:
        raise InvalidInput(f"offline_gate.min_samples is {document.min_samples}; two requests are the least to compare")
    if not 0.0 < document.confidence < 1.0:
        raise InvalidInput(f"offline_gate.confidence is {document.confidence:g}, expected more than 0 and less than 1")
    if not -100.0 < document.min_gain_percent < 1000.0:
        raise InvalidInput(f"offline_gate.min_gain_percent is {document.min_gain_percent:g}, expected -100 to 1000")
    return GatePolicy(
        min_samples=document.min_samples,
        min_gain_percent=document.min_gain_percent,
        confidence=document.confidence,
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

"""Conversion between protobuf messages and domain objects."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, replace

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry.rollout.canary import CanaryState
from updraft_registry.rollout.gate.live import Estimate
from updraft_registry.rollout.placement import Directive, Switchback
from updraft_registry.rollout.version import (
    NO_DRAFT,
    Speculator,
    Transition,
    Version,
    roles_of,
)
from updraft_rollouts.terms import Phase, Source


def pending(manifest: registry_pb2.Manifest, number: int, now_ms: int) -> Version:
    source = Source.from_proto(manifest.source)
    if source is None:
        raise InvalidInput(f"source is {manifest.source}, expected one of {', '.join(term.name for term in Source)}")
    parent = f", trained from version {manifest.parent_version}" if manifest.parent_version else ""
    return Version(
        number=number,
        digest=manifest.digest,
        tensors_digest=manifest.tensors_digest,
        source=source,
        phase=Phase.PENDING,
        reason=f"published ({source}{parent})",
        published_ms=now_ms,
        since_ms=now_ms,
        size_bytes=manifest.size_bytes,
        evaluation=manifest.evaluation if manifest.HasField("evaluation") else None,
    )


def version_from_proto(message: registry_pb2.Version) -> Version:
    """Version from a stored document."""
    phase = Phase.from_proto(message.phase) or Phase.PENDING
    return replace(
        pending(message.manifest, message.version, message.published_unix_ms),
        phase=phase,
        reason=message.reason,
        since_ms=message.phase_since_unix_ms,
        is_retained=message.retain,
    )


def version_to_proto(
    version: Version, manifest: registry_pb2.Manifest, *, is_full: bool = True
) -> registry_pb2.Version:
    """Version message. Without `is_full` its manifest lacks tensors, samples and tenants."""
    message = registry_pb2.Version(
        version=version.number,
        manifest=manifest,
        phase=version.phase.to_proto(),
        reason=version.reason,
        published_unix_ms=version.published_ms,
        phase_since_unix_ms=version.since_ms,
        retain=version.is_retained,
        pruned=not version.is_kept,
    )
    if not is_full:
        message.manifest.ClearField("tensors")
        message.manifest.evaluation.ClearField("samples")
        message.manifest.provenance.ClearField("tenants")
    return message


def state_to_proto(
    speculator: Speculator,
    canary_state: CanaryState | None,
    message: str,
    *,
    pods: registry_pb2.Pods,
    traffic: Sequence[registry_pb2.VersionTraffic],
) -> registry_pb2.SpeculatorState:
    desired = speculator.desired
    roles = roles_of(speculator)
    state = registry_pb2.SpeculatorState(
        speculator=speculator.name,
        stable=roles.stable,
        candidate=canary_state.rollout.candidate if canary_state else NO_DRAFT,
        previous=roles.previous,
        latest=roles.latest,
        pinned=desired.pinned,
        pin_reason=desired.pin_reason,
        paused=desired.is_paused,
        pause_reason=desired.pause_reason,
        policy=desired.policy.to_proto(),
        pods=pods,
        traffic=traffic,
        message=message,
        target_fingerprint=speculator.target,
        forgotten_unix_ms=speculator.forgotten_ms,
    )
    if canary_state is not None:
        state.rollout.CopyFrom(_rollout(canary_state))
        state.step, state.step_since_unix_ms = canary_state.step, canary_state.rollout.step_since_ms
    return state


def _rollout(canary_state: CanaryState) -> registry_pb2.Rollout:
    rollout, judgement, step = canary_state.rollout, canary_state.judgement, canary_state.step
    return registry_pb2.Rollout(
        candidate=rollout.candidate,
        baseline=rollout.baseline,
        comparison=rollout.comparison.to_proto(),
        step=step,
        steps=len(canary_state.policy.steps),
        pods_percent=canary_state.policy.steps[step].pods_percent,
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
        domains=[
            registry_pb2.DomainEstimate(domain=domain.name, acceptance_length=_estimate(domain.estimate))
            for domain in judgement.domains
        ],
    )


def transition_to_proto(transition: Transition) -> registry_pb2.Transition:
    return registry_pb2.Transition(
        unix_ms=transition.at_ms,
        version=transition.number,
        from_phase=_phase(transition.before),
        to_phase=_phase(transition.after),
        reason=transition.reason,
        actor=transition.actor,
    )


def directive_to_proto(directive: Directive, *, num_pods: int = 1) -> fleet_pb2.Directive:
    """The message of a directive that up to `num_pods` pods get at the same time.

    Its nonce is a hash of its content, so a restarted registry repeats it and no pod swaps.
    """
    plan = directive.switchback
    message = fleet_pb2.Directive(
        serve_version=directive.serve,
        serve_digest=directive.digest,
        prefetch_versions=directive.prefetch,
        serve_phase=_phase(directive.phase),
        reason=directive.reason,
        switchback=_switchback(plan) if plan else None,
        comparing=directive.is_comparing,
    )
    message.nonce = hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()[:16]
    message.prefetch_spread_ms = PREFETCH_SPREAD_MS * num_pods
    return message


PREFETCH_SPREAD_MS = 5
"""Per pod: a thousand pods start to fetch within five seconds, and a single pod starts at once."""


def _phase(phase: Phase | None) -> registry_pb2.Phase.ValueType:
    return registry_pb2.PHASE_UNSPECIFIED if phase is None else phase.to_proto()


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
    """Estimate message; absent until the estimate has bounds."""
    if estimate is None or math.isinf(estimate.high_percent):
        return None
    return registry_pb2.Estimate(**asdict(estimate))

"""A rollout as a person or a script reads it: what is tried against what, how it does, and how it ended."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.backends import registry
from updraft_cli.backends.drafts import Acceptance, Draft, acceptance_of, draft, pinned, time, word
from updraft_cli.backends.policy import Policy

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub


class Outcome(StrEnum):
    """What became of a version so far."""

    NOTHING = "nothing"
    """There is no version."""
    PROMOTED = "promoted"
    UNDER_WAY = "under way"
    """It is tried, waits or is held, or not all pods serve it yet."""
    LOST = "lost"
    """Rejected, rolled back, failed, or superseded before it won."""

    @property
    def exit_code(self) -> int:
        """For scripts; 1 and 2 say that it could not be told."""
        return _EXIT_CODES[self]


_EXIT_CODES = {Outcome.NOTHING: 0, Outcome.PROMOTED: 0, Outcome.LOST: 3, Outcome.UNDER_WAY: 4}

_LOST = {pb.PHASE_REJECTED, pb.PHASE_ROLLED_BACK, pb.PHASE_FAILED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Candidate against stable; the bounds are those of the confidence sequence, None while there are none."""

    candidate: float
    stable: float
    change_percent: float
    low_percent: float | None
    high_percent: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The rollout that runs."""

    candidate: int
    baseline: int
    comparison: str
    """By `pods`, or by `switchback`."""
    step: int
    """From 1."""
    steps: int
    pods_percent: int
    started: datetime
    step_since: datetime
    paused_s: float
    verdict: str
    """`hold`: not yet known; `pass`, `fail`."""
    acceptance_length: Estimate | None
    """Tokens a verify step."""
    inter_token_latency_s: Estimate | None
    requests: int
    """Of the candidate."""
    slices: int
    failures: int
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """How many pods do what."""

    connected: int
    serving_stable: int
    serving_candidate: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a speculator serves, what is tried, and what that waits for; 0 = no version."""

    speculator: str
    message: str
    """One sentence of the registry's: what the rollout is waiting for."""
    stable: int
    candidate: int
    previous: int
    latest: int
    pinned: int | None
    pin_reason: str
    paused: bool
    pause_reason: str
    pods: Pods
    acceptance: Acceptance | None
    """Of the stable version, in the pods that are connected now."""
    trial: Trial | None
    version: Draft | None
    """The version that this is about: the one asked for, else the candidate, else the newest."""
    outcome: Outcome
    """What became of that version."""
    policy: Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The version that a status is about."""

    version: pb.Version
    has_served: bool = False
    """Of a superseded one: it was stable before."""


async def look(stub: "RegistryAsyncStub", speculator: str, number: int = 0) -> Status:
    """Ask for the state; `number` chooses the version that it is about."""
    state, _ = await registry.newest(stub, speculator)
    return status(state, await subject(stub, speculator, number or state.candidate or state.latest))


async def subject(stub: "RegistryAsyncStub", speculator: str, number: int) -> Subject | None:
    """Ask for a version; None for 0."""
    if not number:
        return None
    version = await registry.version(stub, speculator, number)
    if version.phase != pb.PHASE_SUPERSEDED:
        return Subject(version=version)
    return Subject(version=version, has_served=has_served(await registry.history(stub, speculator, number)))


def has_served(history: Sequence[pb.Transition]) -> bool:
    """Whether a superseded version was stable before; `history` is oldest first, and tells also of what moved nothing."""
    last = next((event for event in reversed(history) if event.to_phase), pb.Transition())
    return last.from_phase == pb.PHASE_STABLE


def status(state: pb.SpeculatorState, about: Subject | None) -> Status:
    """Return a state of the wire, told of one version."""
    return Status(
        speculator=state.speculator,
        message=state.message,
        stable=state.stable,
        candidate=state.candidate,
        previous=state.previous,
        latest=state.latest,
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
        trial=_trial(state.rollout) if state.HasField("rollout") else None,
        version=draft(about.version, state.traffic) if about else None,
        outcome=outcome(about, state),
        policy=Policy.from_proto(state.policy),
    )


def outcome(about: Subject | None, state: pb.SpeculatorState) -> Outcome:
    """Return what became of a version. Promoted is one that all pods that can serve it do serve."""
    if about is None:
        return Outcome.NOTHING
    version = about.version
    if version.version == state.candidate:
        return Outcome.UNDER_WAY
    if version.version == state.stable:
        is_everywhere = state.pods.serving_stable + state.pods.failed >= state.pods.connected
        return Outcome.PROMOTED if is_everywhere else Outcome.UNDER_WAY
    if version.phase in _LOST:
        return Outcome.LOST
    if version.phase == pb.PHASE_SUPERSEDED:
        return Outcome.PROMOTED if about.has_served else Outcome.LOST
    return Outcome.UNDER_WAY


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
        acceptance_length=_estimate(rollout.acceptance_length) if has_acceptance else None,
        inter_token_latency_s=_estimate(rollout.inter_token_latency) if has_latency else None,
        requests=rollout.candidate_requests,
        slices=rollout.slices,
        failures=rollout.failures,
        evidence=rollout.evidence,
    )


def _estimate(estimate: pb.Estimate) -> Estimate:
    """Without observations enough the registry says -100 and infinity, which no ratio can break."""
    has_bounds = math.isfinite(estimate.high_percent)
    return Estimate(
        candidate=estimate.candidate,
        stable=estimate.stable,
        change_percent=estimate.change_percent,
        low_percent=estimate.low_percent if has_bounds else None,
        high_percent=estimate.high_percent if has_bounds else None,
    )

"""A speculator as plain values, whichever backend it comes from: what serves, what is in canary, and how a version ended."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from typing import Self

from updraft_cli.backends.drafts import Acceptance, DomainAcceptance, Draft, HistoryEntry
from updraft_cli.backends.policy import Policy

ROLES = ("stable", "candidate", "previous", "latest")
"""Words that name a version by its current role."""

LOST = frozenset({"rejected", "rolled back", "failed"})
"""Phases of versions that never serve again."""


class Outcome(StrEnum):
    """Result of a version's rollout so far."""

    NOTHING = "nothing"
    """There is no version."""
    PROMOTED = "promoted"
    UNDER_WAY = "under way"
    """In canary, waiting or held, or not on all pods yet."""
    LOST = "lost"
    """Rejected, rolled back, failed, or superseded before it won."""

    @property
    def exit_code(self) -> int:
        """Exit code for scripts; 1 and 2 mean that the command failed."""
        return _EXIT_CODES[self]


_EXIT_CODES = {Outcome.NOTHING: 0, Outcome.PROMOTED: 0, Outcome.LOST: 3, Outcome.UNDER_WAY: 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricChange:
    """Candidate against stable; the bounds are those of the confidence sequence, None while there are none."""

    candidate: float
    stable: float
    change_percent: float
    low_percent: float | None = None
    high_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """Speed of decoding over that without speculation; the bounds are those of the 90 % interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainChange:
    """Candidate against stable in the traffic of one domain."""

    domain: str
    acceptance_length: MetricChange | None
    """Tokens per verify step; None before there are bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    candidate: int
    baseline: int
    comparison: str = ""
    """`pods` or `switchback`."""
    step: int | None
    """From 1."""
    steps: int | None
    pods_percent: int | None = None
    started: datetime | None = None
    step_since: datetime | None = None
    paused_s: float = 0.0
    verdict: str = ""
    """`hold`: not known yet; `pass`, `fail`."""
    acceptance_length: MetricChange | None = None
    """Tokens per verify step."""
    inter_token_latency_s: MetricChange | None = None
    requests: int | None = None
    """Requests that the candidate served."""
    slices: int | None = None
    failures: int | None = None
    evidence: str = ""
    domains: tuple[DomainChange, ...] = ()
    """Those that both versions served, the worst change first; empty in a cluster, whose resource does not have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """Inference pods, counted."""

    connected: int | None = None
    """Connected to the registry; None in a cluster."""
    ready: int | None = None
    """Ready in Kubernetes; None for a registry."""
    wanted: int | None = None
    serving_stable: int | None = None
    serving_candidate: int | None = None
    failed: int = 0
    """Connected, but cannot load the version they should serve; in a cluster: not ready, for a reason that may last."""

    @property
    def num(self) -> int:
        """Pods that are connected or ready."""
        return self.connected or self.ready or 0

    @property
    def is_stable_everywhere(self) -> bool:
        """Whether every pod that can serve the stable version does."""
        unable = 0 if self.connected is None else self.failed
        return (self.serving_stable or 0) + unable >= self.num


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedVersion:
    """A version with its live acceptance; version 0 means without a draft."""

    version: int
    phase: str
    acceptance: Acceptance


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One aspect of an AdaptiveSpeculator's state."""

    type: str
    status: str
    """True, False or Unknown."""
    reason: str
    message: str
    since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    version: int
    reason: str
    message: str
    time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """The part of an AdaptiveSpeculator that a registry does not have."""

    target: str
    engine: str
    url: str
    is_suspended: bool
    is_current: bool
    """The operator has acted on the newest spec."""
    is_reconciled: bool
    """An operator has written a status."""
    promoted: int | None
    """spec.rollout.promotedVersion."""
    trainer_state: str
    last_published: datetime | None
    last_failure: Failure | None
    conditions: tuple[Condition, ...]

    def condition(self, kind: str) -> Condition | None:
        """Return the condition of that type, if it exists."""
        return next((condition for condition in self.conditions if condition.type == kind), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficKind:
    """Stored requests of one kind of traffic: a domain that callers named, or requests that resemble each other."""

    name: str
    samples: int
    """To train on."""
    held_out: int
    last_hour: int
    """Those of both together that ended within an hour before the newest."""
    last_day: int
    recent_share: float
    """Share of today's traffic."""
    candidate_length: float | None
    """Tokens per verify step of the draft in training on its held-out requests; None: not known."""
    stable_length: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficShift:
    """Half of the newest requests became of other kinds."""

    time: datetime
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """The trainer's progress."""

    samples: int
    """Stored requests to train on."""
    held_out: int
    steps: int
    """Optimizer steps of the draft in training."""
    estimates: int
    """Candidates that were judged on held-out requests since the trainer started."""
    loss: float | None = None
    """Loss of the last step, in nats per token."""
    held_out_length: MetricChange | None = None
    """Tokens per verify step on held-out requests: the draft in training against the one that serves."""
    trained_length: float | None = None
    """The same of the draft in training, on requests that it was trained on."""
    lag_s: float | None = None
    """Age of the newest stored request when it was stored."""
    demand_tokens_per_s: float | None = None
    """Captured tokens per second that the trainer can use."""
    granted_tokens_per_s: float | None = None
    """Those of them that the connected pods were granted."""
    kinds: tuple[TrafficKind, ...] = ()
    """Stored requests by kind of traffic, the largest first."""
    shifts: tuple[TrafficShift, ...] = ()
    """The last shifts of the traffic, the oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast training is, and where its time goes."""

    device: str
    """Empty: unknown."""
    ranks: int
    """Processes that train together."""
    tokens_per_second: float
    """In the last minute, with its pauses."""
    utilization: float | None
    """Model FLOPs utilization; None on a CPU."""
    shares: dict[str, float]
    """Share of the last minute by phase, the largest first."""
    steps_to_estimate: int
    estimate_due: datetime | None
    """When an estimate is due if weights or held-out requests have changed."""
    last_save: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculator:
    """One speculator; version 0 means no version."""

    name: str
    namespace: str = ""
    message: str
    """The condition that the rollout waits for, in one sentence."""
    stable: int
    candidate: int
    previous: int
    latest: int
    pinned: int | None
    """0: pinned to no draft."""
    pin_reason: str = ""
    paused: bool
    pause_reason: str = ""
    pods: Pods
    acceptance: Acceptance | None
    """Acceptance of the stable version on the pods that are connected now."""
    domains: tuple[DomainAcceptance, ...] = ()
    """Acceptance of the stable version and the candidate, the largest domain first."""
    speedup: Speedup | None = None
    """Mean over the connected pods, which measure it."""
    trial: Trial | None
    policy: Policy = field(default_factory=Policy)
    traffic: tuple[ServedVersion, ...] = ()
    capture_problem: str = ""
    """Which pod captures nothing, and why."""
    trainer_message: str = ""
    """One sentence: the last publication, or the reason why nothing is published."""
    learning: Learning | None = None
    """None: no trainer reports, or the state is read from Kubernetes, where condition Adapting has it."""
    pace: Pace | None = None
    """None: no trainer reports."""
    too_small: str = ""
    """The setting that is too small for any draft to be published, or for all traces, and what to do; empty: none is."""
    resource: Resource | None = None
    """None: it comes from a registry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStatus(Speculator):
    """A speculator, and the version that the question is about."""

    speculator: str
    """Its name, like `name`."""
    version: Draft | None
    """The version asked for, else the candidate, else the newest."""
    outcome: Outcome
    """Result of that version's rollout."""

    @classmethod
    def of(cls, speculator: Speculator, draft: Draft | None, *, has_served: bool = False) -> Self:
        """Add a version; `has_served` is for a superseded one, see `has_served`."""
        values = {entry.name: getattr(speculator, entry.name) for entry in fields(Speculator)}
        return cls(
            **values,
            speculator=speculator.name,
            version=draft,
            outcome=outcome(speculator, draft, has_served=has_served),
        )


def outcome(speculator: Speculator, draft: Draft | None, *, has_served: bool = False) -> Outcome:
    """Return the result of a version's rollout. It is promoted once every pod that can serve it does."""
    if draft is None:
        return Outcome.NOTHING
    if (current := outcome_of_role(speculator, draft.version)) is not None:
        return current
    if draft.phase in LOST:
        return Outcome.LOST
    if draft.phase == "superseded":
        return Outcome.PROMOTED if has_served else Outcome.LOST
    return Outcome.UNDER_WAY


def outcome_of_role(speculator: Speculator, number: int | None) -> Outcome | None:
    """Return the outcome of the candidate or of the stable version; None for any other."""
    if number == speculator.candidate:
        return Outcome.UNDER_WAY
    if number == speculator.stable:
        return Outcome.PROMOTED if speculator.pods.is_stable_everywhere else Outcome.UNDER_WAY
    return None


def has_served(history: Iterable[HistoryEntry]) -> bool:
    """Whether a superseded version was stable before; `history` is oldest first and may hold entries without a phase."""
    changes = [entry for entry in history if entry.phase]
    return bool(changes) and changes[-1].before == "stable"

"""The registry's domain: versions and their phases, the evaluation behind them, and what an operator wishes.

Pure data. The manifest stays the document that was published (bytes in, the same bytes out); only the facts
that a decision needs are lifted out of it here. Times are integer milliseconds since 1970, so that what was
written and read back is equal. Version 0 is the absence of a draft; real versions count from 1 within a
speculator.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from updraft_registry.rollout.comparison import Evidence
from updraft_rollouts.policy import DEFAULT, RolloutPolicy
from updraft_rollouts.terms import Comparison, Phase, Source

NO_DRAFT = 0


class Actor(StrEnum):
    """Who caused a transition."""

    GATE = "gate"
    OPERATOR = "operator"
    FLEET = "fleet"
    REGISTRY = "registry"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSample:
    """One held-out request: the verify steps that candidate and baseline needed for the same tokens."""

    trace_id: str
    tokens: int
    candidate_steps: int
    baseline_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The trainer's offline comparison. `lookahead` is the most drafts a step could propose; 0 = not said."""

    baseline_version: int
    samples: tuple[EvaluationSample, ...]
    lookahead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """What an operator wants. Its reasons are for people; `pinned` None means that nothing is pinned."""

    policy: RolloutPolicy = DEFAULT
    pinned: int | None = None
    pin_reason: str = ""
    is_paused: bool = False
    pause_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable draft and its mutable phase."""

    number: int
    digest: str
    tensors_digest: str
    source: Source
    phase: Phase
    reason: str
    published_ms: int
    since_ms: int
    evaluation: Evaluation | None = None
    proven_ms: int = 0
    """When it last won, later than all that won before; a pin is no win. 0: it never has."""
    is_retained: bool = False
    is_kept: bool = True
    """Its weights are in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A version changed its phase, and why.

    Without phases: something else happened (a pause; then `number` is 0).
    """

    number: int
    before: Phase | None
    after: Phase | None
    reason: str
    actor: Actor
    at_ms: int
    proven_ms: int = 0
    """The version's, if it won by this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A canary that runs.

    Its time is counted from one decision to the next: a clock that jumps, or a registry that was away, costs a
    minute at most.
    """

    candidate: int
    baseline: int
    comparison: Comparison
    """PODS or SWITCHBACK."""
    started_ms: int
    step_since_ms: int
    step: int = 0
    last_decision_ms: int = 0
    """When it was last decided on; 0: not since the registry started."""
    run_ms: int = 0
    """Since it began, without pauses."""
    held_ms: int = 0
    """Since all pods of this step served the candidate for the first time, without pauses."""
    paused_ms: int = 0
    pods: tuple[str, ...] = ()
    """Those that have a place in it, in the order in which they were chosen."""
    evidence: Evidence

    @property
    def trying(self) -> tuple[str, ...]:
        """Those of its pods that are to serve the candidate: one that crashed with it sits out while there are others.

        So a candidate that kills whoever loads it is loaded once by each, and then by one at a time.
        """
        return tuple(name for name in self.pods if name not in self.evidence.crashes) or self.pods[:1]

    def to_json(self) -> str:
        """What outlives a restart; equal texts mean that nothing worth writing changed."""
        return json.dumps(
            {
                "candidate": self.candidate,
                "baseline": self.baseline,
                "comparison": self.comparison,
                "started_ms": self.started_ms,
                "step_since_ms": self.step_since_ms,
                "step": self.step,
                "pods": self.pods,
                "evidence": self.evidence.to_json(),
                **{name: getattr(self, name) // _CLOCK_MS * _CLOCK_MS for name in ("run_ms", "held_ms", "paused_ms")},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """As it was written."""
        kept = json.loads(text)
        return cls(
            **kept
            | {
                "comparison": Comparison(kept["comparison"]),
                "pods": tuple(kept["pods"]),
                "evidence": Evidence.from_json(kept["evidence"]),
            }
        )


_CLOCK_MS = 10_000
"""How exactly the clocks of a rollout are written: not with every decision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What all versions of a speculator share, set by the first: engines cannot swap across it."""

    target_fingerprint: str
    draft_vocabulary_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculator:
    """The whole state of one speculator. `versions` are those whose weights are kept, ascending."""

    name: str
    desired: DesiredState
    lineage: Lineage | None = None
    versions: tuple[Version, ...] = ()
    rollout: Rollout | None = None
    """Of the version in canary; one of another version is over."""
    latest: int = NO_DRAFT
    """The highest number ever given, kept or not."""
    is_known: bool = True
    """Something was published or wished."""


def stable(versions: tuple[Version, ...]) -> Version | None:
    """The version that serves everyone, if one does; there is never more than one."""
    return next((version for version in versions if version.phase is Phase.STABLE), None)


def in_canary(versions: tuple[Version, ...]) -> Version | None:
    """The version that is tried on some pods, if one is; there is never more than one."""
    return next((version for version in versions if version.phase is Phase.CANARY), None)


def newest_proven(versions: tuple[Version, ...], *, other_than: int = NO_DRAFT) -> Version | None:
    """The version that won last and was never condemned: what a failure falls back to."""
    proven = (v for v in versions if v.proven_ms and not v.phase.is_condemned and v.number != other_than)
    return max(proven, key=lambda version: (version.proven_ms, version.number), default=None)


def name_of(number: int) -> str:
    """How a sentence calls a version."""
    return "no draft" if number == NO_DRAFT else f"version {number}"


def with_reason(what: str, why: str) -> str:
    """Add a reason that a person gave, if one was."""
    return f"{what}: {why}" if why else what

"""The registry's domain: versions and their phases, the evaluation behind them, and what an operator wishes.

Pure data. The manifest stays the document that was published (bytes in, the same bytes out); only the facts
that a decision needs are lifted out of it here. Times are integer milliseconds since 1970, so that what was
written and read back is equal. Version 0 is the absence of a draft; real versions count from 1 within a
speculator.
"""

from dataclasses import dataclass
from enum import StrEnum

NO_DRAFT = 0


class Phase(StrEnum):
    """Where a version is in its life."""

    PENDING = "Pending"
    HELD = "Held"
    CANARY = "Canary"
    STABLE = "Stable"
    SUPERSEDED = "Superseded"
    REJECTED = "Rejected"
    ROLLED_BACK = "RolledBack"
    FAILED = "Failed"

    @property
    def is_condemned(self) -> bool:
        """Never served, whoever asks: it lost, or a pod could not load it."""
        return self in (Phase.REJECTED, Phase.ROLLED_BACK, Phase.FAILED)

    @property
    def is_waiting(self) -> bool:
        """Not yet decided on."""
        return self in (Phase.PENDING, Phase.HELD)


class Source(StrEnum):
    """Who made a version."""

    INITIAL = "Initial"
    TRAINER = "Trainer"
    IMPORTED = "Imported"


class Strategy(StrEnum):
    """How a version that passed the offline gate gets to the pods."""

    IMMEDIATE = "Immediate"
    MANUAL = "Manual"


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
class GatePolicy:
    """What the offline gate asks for. `confidence` is two-sided, in (0, 1)."""

    min_samples: int = 8
    min_gain_percent: float = 1.0
    confidence: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How versions of one speculator roll out.

    `history_limit`: servable versions kept besides the live ones.
    """

    strategy: Strategy = Strategy.IMMEDIATE
    gate: GatePolicy = GatePolicy()
    history_limit: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What an operator wants. Its reasons are for people; `pinned` None means that nothing is pinned."""

    policy: Policy = Policy()
    pinned: int | None = None
    pin_reason: str = ""
    is_paused: bool = False
    pause_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable draft and its mutable phase.

    `is_proven`: it has been stable before, so it can be gone back to.
    """

    number: int
    digest: str
    tensors_digest: str
    source: Source
    phase: Phase
    reason: str
    published_ms: int
    since_ms: int
    evaluation: Evaluation | None = None
    is_proven: bool = False
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What all versions of a speculator share, set by the first: engines cannot swap across it."""

    target_fingerprint: str
    draft_vocabulary_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculator:
    """The whole state of one speculator. `versions` are those whose weights are kept, ascending."""

    name: str
    wish: Wish
    lineage: Lineage | None = None
    versions: tuple[Version, ...] = ()
    latest: int = NO_DRAFT
    """The highest number ever given, kept or not."""
    is_known: bool = True
    """Something was published or wished."""


def stable(versions: tuple[Version, ...]) -> Version | None:
    """The version that serves everyone, if one does; there is never more than one."""
    return next((version for version in versions if version.phase is Phase.STABLE), None)


def newest_proven(versions: tuple[Version, ...], *, other_than: int = NO_DRAFT) -> Version | None:
    """The newest version that has served before and was never condemned: what a failure falls back to."""
    proven = (v for v in versions if v.is_proven and not v.phase.is_condemned and v.number != other_than)
    return max(proven, key=lambda version: version.number, default=None)


def call(number: int) -> str:
    """How a sentence calls a version."""
    return "no draft" if number == NO_DRAFT else f"version {number}"


def because(what: str, why: str) -> str:
    """Add a reason that a person gave, if one was."""
    return f"{what}: {why}" if why else what

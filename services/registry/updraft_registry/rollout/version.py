"""The registry's domain: versions and the desired state of a speculator.

Pure data. A manifest is stored as it was published; only the facts that a decision needs are copied here. Times are integer
milliseconds since 1970, so that they survive a round trip. Version 0 means no draft; versions of a speculator count from 1.
"""

import json
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Self

from updraft.registry.v1 import registry_pb2
from updraft_registry.rollout.comparison import Evidence
from updraft_rollouts.policy import DEFAULT, RolloutPolicy
from updraft_rollouts.terms import Comparison, Phase, Source

NO_DRAFT = 0


class Actor(StrEnum):
    GATE = "gate"
    OPERATOR = "operator"
    FLEET = "fleet"
    REGISTRY = "registry"


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """Policy, pin and pause of a speculator. `pinned` is None if nothing is pinned, 0 if no draft may serve."""

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
    size_bytes: int = 0
    """Size of the weights file."""
    evaluation: registry_pb2.Evaluation | None = None
    proven_ms: int = 0
    """When it last won, always later than all earlier wins; 0: never. A pin does not count as a win."""
    is_retained: bool = False
    is_kept: bool = True
    """Its weights are in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A phase change of a version, or, without phases, another event such as a pause (`number` is then 0)."""

    number: int
    before: Phase | None
    after: Phase | None
    reason: str
    actor: Actor
    at_ms: int
    proven_ms: int = 0
    """New value of `Version.proven_ms` if the version won; otherwise 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A running canary.

    Its time adds up the intervals between decisions. Each counts for at most one minute, so that a clock that jumps or a
    registry that was down does not use up the deadline.
    """

    candidate: int
    baseline: int
    """The stable version; 0: there is none, so the candidate is compared with no draft, on its own pods."""
    comparison: Comparison
    """PODS or SWITCHBACK."""
    started_ms: int
    step_since_ms: int
    step: int = 0
    last_decision_ms: int = 0
    """Time of the last decision; 0: none since the registry started."""
    run_ms: int = 0
    """Time since it began, without pauses."""
    held_ms: int = 0
    """Time since all pods of this step first served the candidate, without pauses."""
    paused_ms: int = 0
    pods: tuple[str, ...] = ()
    """Pods that belong to the canary, in the order in which they were chosen."""
    evidence: Evidence

    @property
    def trying(self) -> tuple[str, ...]:
        """Pods that should serve the candidate. A pod that crashed with it is left out while there are others.

        So a candidate that crashes every pod is loaded once by each, and then by one pod at a time.
        """
        return tuple(name for name in self.pods if name not in self.evidence.crashes) or self.pods[:1]

    def to_json(self) -> str:
        """State to restore after a restart. Equal texts mean that nothing needs to be written."""
        stored = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "last_decision_ms"}
        stored |= {name: stored[name] // _CLOCK_MS * _CLOCK_MS for name in ("run_ms", "held_ms", "paused_ms")}
        return json.dumps(stored | {"evidence": self.evidence.to_json()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        stored = json.loads(text)
        stored["comparison"] = Comparison(stored["comparison"])
        stored["pods"] = tuple(stored["pods"])
        stored["evidence"] = Evidence.from_json(stored["evidence"])
        return cls(**stored)


_CLOCK_MS = 10_000
"""Resolution of the stored clocks, so that not every decision is a write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculator:
    """State of one speculator. `versions` are those whose weights are kept, in ascending order."""

    name: str
    desired: DesiredState
    target: str = ""
    """Fingerprint of the target of all versions. The first one sets it; empty before."""
    versions: tuple[Version, ...] = ()
    rollout: Rollout | None = None
    """The rollout of the version in canary. One of another version is over."""
    latest: int = NO_DRAFT
    """Highest number ever assigned."""
    is_known: bool = True
    """A version was published or a desired state was set."""
    forgotten_ms: int = 0
    """When a tenant was ordered to be forgotten last; 0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The version in each role; 0: none."""

    stable: int
    candidate: int
    previous: int
    latest: int


def stable(versions: tuple[Version, ...]) -> Version | None:
    """The stable version, if there is one. There is never more than one."""
    return next((version for version in versions if version.phase is Phase.STABLE), None)


def in_canary(versions: tuple[Version, ...]) -> Version | None:
    """The version in canary, if there is one. There is never more than one."""
    return next((version for version in versions if version.phase is Phase.CANARY), None)


def newest_proven(versions: tuple[Version, ...], *, other_than: int = NO_DRAFT) -> Version | None:
    """The version that won last and is not condemned. It takes over after a failure."""
    proven = (v for v in versions if v.proven_ms and not v.phase.is_condemned and v.number != other_than)
    return max(proven, key=lambda version: (version.proven_ms, version.number), default=None)


def roles_of(speculator: Speculator) -> Roles:
    serving = number_of(stable(speculator.versions))
    return Roles(
        stable=serving,
        candidate=number_of(in_canary(speculator.versions)),
        previous=number_of(newest_proven(speculator.versions, other_than=serving)),
        latest=speculator.latest,
    )


def number_of(version: Version | None) -> int:
    return version.number if version else NO_DRAFT


def name_of(number: int) -> str:
    return "no draft" if number == NO_DRAFT else f"version {number}"


def with_reason(what: str, why: str) -> str:
    return f"{what}: {why}" if why else what

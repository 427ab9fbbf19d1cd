"""What the API server's objects say, as plain values; what a status does not say yet is absent, never guessed."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Json = Mapping[str, Any]

GROUP = "updraft.dev"
SPECULATORS = "adaptivespeculators"
DRAFT_VERSIONS = "draftversions"
ROLES = ("stable", "candidate", "previous", "latest")
"""Words for a version, by what it is to its speculator now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One aspect of the state."""

    type: str
    status: str
    """True, False or Unknown."""
    reason: str
    message: str
    since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Which version has which role; None: no version."""

    stable: int | None
    candidate: int | None
    previous: int | None
    latest: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What is tried, and what that waits for."""

    phase: str
    version: int | None
    step: int | None
    """From 1."""
    steps: int | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the spec says of the rollout: the fields that this program sets, and the strategy."""

    strategy: str
    pinned: int | None
    """0: no draft."""
    paused: bool
    promoted: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """The inference pods."""

    wanted: int | None
    ready: int
    serving_stable: int | None
    """As their engines say."""
    failed: int
    """Not ready, for a reason that waiting may not end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Tokens a verify step, as decimals."""

    stable: str
    candidate: str
    verify_steps: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """The trainer."""

    state: str
    last_published: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The version that was last found to be no good."""

    version: int
    reason: str
    message: str
    time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculator:
    """One AdaptiveSpeculator."""

    namespace: str
    name: str
    target: str
    engine: str
    is_suspended: bool
    is_current: bool
    """The operator has seen the newest spec."""
    is_known: bool
    """An operator has written a status."""
    wishes: Wishes
    versions: Versions
    rollout: Rollout
    pods: Pods
    acceptance: Acceptance
    trainer: Trainer
    last_failure: Failure | None
    url: str
    conditions: tuple[Condition, ...]

    def condition(self, kind: str) -> Condition | None:
        """Return the condition of that type, if it is there."""
        return next((condition for condition in self.conditions if condition.type == kind), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A change of phase."""

    time: datetime | None
    phase: str
    actor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One DraftVersion."""

    namespace: str
    speculator: str
    name: str
    number: int | None
    """None: an import that the registry has not numbered yet."""
    phase: str
    """In words: `stable`, `rolled back`."""
    reason: str
    source: str
    parent: int | None
    samples: int | None
    digest: str
    retained: bool
    acceptance: str
    pods_loaded: int | None
    pods_wanted: int | None
    created: datetime | None
    history: tuple[Moment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A Kubernetes Event about a speculator or one of its versions."""

    time: datetime | None
    kind: str
    name: str
    type: str
    """Normal or Warning."""
    reason: str
    message: str
    count: int


def speculator(content: Json) -> Speculator:
    """Read an AdaptiveSpeculator."""
    metadata, spec, status = content["metadata"], _part(content, "spec"), _part(content, "status")
    serving, seen = _part(status, "serving"), status.get("observedGeneration")
    acceptance, trainer = _part(status, "acceptance"), _part(status, "trainer")
    return Speculator(
        namespace=metadata.get("namespace", ""),
        name=metadata["name"],
        target=_part(spec, "targetModel").get("uri", ""),
        engine=spec.get("engine", ""),
        is_suspended=spec.get("suspend", False),
        is_current=seen == metadata.get("generation"),
        is_known=bool(status.get("conditions")),
        wishes=_wishes(_part(spec, "rollout")),
        versions=Versions(**{role: _part(status, "versions").get(role) for role in ROLES}),
        rollout=_rollout(_part(status, "rollout")),
        pods=Pods(
            wanted=0 if spec.get("suspend") else _part(spec, "serving").get("replicas"),
            ready=serving.get("readyReplicas", 0),
            serving_stable=serving.get("updatedReplicas"),
            failed=serving.get("failedReplicas", 0),
        ),
        acceptance=Acceptance(
            stable=acceptance.get("stable", ""),
            candidate=acceptance.get("candidate", ""),
            verify_steps=acceptance.get("verifySteps"),
        ),
        trainer=Trainer(state=trainer.get("state", ""), last_published=_time(trainer.get("lastPublishTime"))),
        last_failure=_failure(_part(status, "lastFailure")),
        url=serving.get("url", ""),
        conditions=tuple(map(_condition, status.get("conditions", ()))),
    )


def version(content: Json) -> Version:
    """Read a DraftVersion."""
    metadata, spec, status = content["metadata"], _part(content, "spec"), _part(content, "status")
    pods = _part(status, "pods")
    return Version(
        namespace=metadata.get("namespace", ""),
        speculator=_part(spec, "speculatorRef").get("name", ""),
        name=metadata["name"],
        number=status.get("version", spec.get("version")),
        phase=words(status.get("phase", "")),
        reason=status.get("reason", ""),
        source=words(spec.get("source", "")),
        parent=spec.get("parentVersion"),
        samples=_part(spec, "training").get("samples"),
        digest=spec.get("digest", ""),
        retained=spec.get("retain", False),
        acceptance=_part(status, "acceptance").get("length", ""),
        pods_loaded=pods.get("loaded"),
        pods_wanted=pods.get("target"),
        created=_time(metadata.get("creationTimestamp")),
        history=tuple(map(_moment, status.get("history", ()))),
    )


def event(content: Json) -> Event:
    """Read an Event of either API: the newer one has a time, and a series instead of a count."""
    about, series = _part(content, "involvedObject"), _part(content, "series")
    times = (series.get("lastObservedTime"), content.get("lastTimestamp"), content.get("eventTime"))
    return Event(
        time=_time(next(filter(None, (*times, content["metadata"].get("creationTimestamp"))), None)),
        kind=about.get("kind", ""),
        name=about.get("name", ""),
        type=content.get("type", ""),
        reason=content.get("reason", ""),
        message=content.get("message", ""),
        count=series.get("count") or content.get("count") or 1,
    )


def newest_first(versions: Iterable[Version]) -> tuple[Version, ...]:
    """Return versions by speculator, newest first; what has no number yet is newer than what has one."""
    last = float("inf")
    return tuple(
        sorted(versions, key=lambda v: (v.namespace, v.speculator, -(last if v.number is None else v.number), v.name))
    )


def words(constant: str) -> str:
    """Turn RolledBack into `rolled back`."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", constant).lower()


def writers(content: Json, field: str) -> tuple[str, ...]:
    """Return the field managers that have set `spec.rollout.<field>`, by their own account to the API server."""
    return tuple(dict.fromkeys(_writers(content, field)))


def _writers(content: Json, field: str) -> Iterator[str]:
    for entry in content["metadata"].get("managedFields", ()):
        fields = _part(_part(_part(entry, "fieldsV1"), "f:spec"), "f:rollout")
        if f"f:{field}" in fields:
            yield entry.get("manager", "")


def _part(content: Json, name: str) -> Json:
    found: Json = content.get(name) or {}
    return found


def _wishes(said: Json) -> Wishes:
    return Wishes(
        strategy=said.get("strategy", ""),
        pinned=said.get("pinnedVersion"),
        paused=said.get("paused", False),
        promoted=said.get("promotedVersion"),
    )


def _rollout(said: Json) -> Rollout:
    return Rollout(
        phase=words(said.get("phase", "")),
        version=said.get("version"),
        step=said.get("step"),
        steps=said.get("steps"),
        message=said.get("message", ""),
    )


def _failure(said: Json) -> Failure | None:
    if not said:
        return None
    return Failure(
        version=said["version"], reason=said["reason"], message=said.get("message", ""), time=_time(said.get("time"))
    )


def _condition(said: Json) -> Condition:
    return Condition(
        type=said["type"],
        status=said["status"],
        reason=said["reason"],
        message=said.get("message", ""),
        since=_time(said.get("lastTransitionTime")),
    )


def _moment(said: Json) -> Moment:
    return Moment(
        time=_time(said.get("time")),
        phase=words(said["phase"]),
        actor=said.get("actor", ""),
        reason=said.get("reason", ""),
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None

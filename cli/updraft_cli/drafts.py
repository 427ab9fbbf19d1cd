"""Draft versions as a person or a script reads them: plain values out of the registry's messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from updraft.registry.v1 import registry_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """How the drafts of one version did in live traffic."""

    verify_steps: int
    tokens: int
    length: float
    """Tokens a verify step."""
    by_position: tuple[float, ...]
    """Share of the verify steps that accepted their 1st, 2nd, ... draft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineEvaluation:
    """The trainer's comparison on held-out requests, in tokens a verify step."""

    requests: int
    lookahead: int
    baseline_version: int
    baseline_length: float
    candidate_length: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One version."""

    version: int
    phase: str
    reason: str
    parent: int
    samples: int
    step: int
    size_bytes: int
    digest: str
    published: datetime
    acceptance: Acceptance | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All versions of one speculator, newest first, and what it serves (0 = no draft)."""

    speculator: str
    stable: int
    pinned: int | None
    message: str
    """What the rollout is waiting for."""
    drafts: tuple[Draft, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of a version's weights file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a version."""

    time: datetime
    phase: str
    reason: str
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """Everything about one version."""

    draft: Draft
    speculator: str
    source: str
    target_fingerprint: str
    tensors_digest: str
    code_version: str
    config: str
    """config.json, as text."""
    evaluation: OfflineEvaluation | None
    tensors: tuple[Tensor, ...]
    history: tuple[Event, ...]


def listing(speculator: str, response: pb.ListResponse) -> Listing:
    """Return what a List call for one speculator answered."""
    state = next((s for s in response.speculators if s.speculator == speculator), pb.SpeculatorState())
    return Listing(
        speculator=speculator,
        stable=state.stable,
        pinned=state.pinned if state.HasField("pinned") else None,
        message=state.message,
        drafts=tuple(draft(version, state.traffic) for version in response.versions),
    )


def draft(version: pb.Version, traffic: Sequence[pb.VersionTraffic] = ()) -> Draft:
    """Return one version with what `traffic` says of it."""
    manifest = version.manifest
    return Draft(
        version=version.version,
        phase=phase(version.phase),
        reason=version.reason,
        parent=manifest.parent_version,
        samples=manifest.provenance.samples,
        step=manifest.provenance.step,
        size_bytes=manifest.size_bytes,
        digest=manifest.digest,
        published=_time(version.published_unix_ms),
        acceptance=acceptance_of(version.version, traffic),
    )


def details(version: pb.Version, traffic: Sequence[pb.VersionTraffic], history: Sequence[pb.Transition]) -> Details:
    """Return everything about one version; `version` comes from Get, with tensors and samples."""
    manifest = version.manifest
    return Details(
        draft=draft(version, traffic),
        speculator=manifest.speculator,
        source=_word(pb.Source.Name(manifest.source)),
        target_fingerprint=manifest.target_fingerprint,
        tensors_digest=manifest.tensors_digest,
        code_version=manifest.provenance.code_version,
        config=manifest.config_json,
        evaluation=_evaluation(manifest),
        tensors=tuple(
            Tensor(name=spec.name, dtype=spec.dtype, shape=tuple(spec.shape), digest=spec.digest)
            for spec in manifest.tensors
        ),
        history=tuple(
            Event(time=_time(entry.unix_ms), phase=phase(entry.to_phase), reason=entry.reason, actor=entry.actor)
            for entry in history
        ),
    )


def acceptance_of(version: int, traffic: Sequence[pb.VersionTraffic]) -> Acceptance | None:
    """Return what live traffic says of a version, or None before its first verify step."""
    for counted in traffic:
        if counted.version == version and counted.verify_steps:
            steps = counted.verify_steps
            return Acceptance(
                verify_steps=steps,
                tokens=counted.tokens,
                length=counted.tokens / steps,
                by_position=tuple(accepted / steps for accepted in counted.accepted_by_position),
            )
    return None


def phase(value: "pb.Phase.ValueType") -> str:
    """Return a phase in words: `stable`, `rolled back`."""
    return _word(pb.Phase.Name(value))


def _evaluation(manifest: pb.Manifest) -> OfflineEvaluation | None:
    samples = manifest.evaluation.samples
    candidate_steps = sum(sample.candidate_steps for sample in samples)
    baseline_steps = sum(sample.baseline_steps for sample in samples)
    if not candidate_steps or not baseline_steps:
        return None
    tokens = sum(sample.tokens for sample in samples)
    return OfflineEvaluation(
        requests=len(samples),
        lookahead=manifest.evaluation.lookahead,
        baseline_version=manifest.evaluation.baseline_version,
        baseline_length=tokens / baseline_steps,
        candidate_length=tokens / candidate_steps,
    )


def _word(constant: str) -> str:
    """Turn PHASE_ROLLED_BACK into `rolled back`."""
    return constant.partition("_")[2].replace("_", " ").lower()


def _time(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, UTC)

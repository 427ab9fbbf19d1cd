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
    """Of the drafts proposed as the 1st, 2nd, ... of a verify step, the share that was accepted."""


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
    since: datetime
    """When it got there."""
    reason: str
    source: str
    """Who made it: trainer, imported, initial."""
    parent: int
    samples: int
    step: int
    size_bytes: int
    digest: str
    published: datetime
    retained: bool
    """Kept whatever retention says."""
    acceptance: Acceptance | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All versions of one speculator, newest first, and what it serves (0 = no draft)."""

    speculator: str
    stable: int
    candidate: int
    """On trial now; 0 = none."""
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
    version: int
    """0: to the speculator as a whole."""
    before: str
    phase: str
    """The phase after it; empty, like `before`, where no phase changed."""
    reason: str
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What happened to the versions of a speculator, oldest first."""

    speculator: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the weights come from."""

    first_trace: str
    last_trace: str
    config_digest: str
    code_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """Everything about one version."""

    draft: Draft
    speculator: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    draft_vocabulary_fingerprint: str
    tensors_digest: str
    provenance: Provenance
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
        candidate=state.candidate,
        pinned=pinned(state),
        message=state.message,
        drafts=tuple(draft(version, state.traffic) for version in response.versions),
    )


def draft(version: pb.Version, traffic: Sequence[pb.VersionTraffic] = ()) -> Draft:
    """Return one version with what `traffic` says of it."""
    manifest = version.manifest
    return Draft(
        version=version.version,
        phase=phase(version.phase),
        since=time(version.phase_since_unix_ms),
        reason=version.reason,
        source=word(pb.Source.Name(manifest.source)),
        parent=manifest.parent_version,
        samples=manifest.provenance.samples,
        step=manifest.provenance.step,
        size_bytes=manifest.size_bytes,
        digest=manifest.digest,
        published=time(version.published_unix_ms),
        retained=version.retain,
        acceptance=acceptance_of(version.version, traffic),
    )


def details(
    version: pb.Version, traffic: Sequence[pb.VersionTraffic], history: Sequence[pb.Transition] = ()
) -> Details:
    """Return everything about one version; `version` comes from Get, with tensors and samples."""
    manifest, provenance = version.manifest, version.manifest.provenance
    return Details(
        draft=draft(version, traffic),
        speculator=manifest.speculator,
        target_fingerprint=manifest.target_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        draft_vocabulary_fingerprint=manifest.draft_vocabulary_fingerprint,
        tensors_digest=manifest.tensors_digest,
        provenance=Provenance(
            first_trace=provenance.first_trace_id,
            last_trace=provenance.last_trace_id,
            config_digest=provenance.config_digest,
            code_version=provenance.code_version,
        ),
        config=manifest.config_json,
        evaluation=_evaluation(manifest),
        tensors=tuple(
            Tensor(name=spec.name, dtype=spec.dtype, shape=tuple(spec.shape), digest=spec.digest)
            for spec in manifest.tensors
        ),
        history=tuple(map(event, history)),
    )


def event(transition: pb.Transition) -> Event:
    """Return one line of the history."""
    return Event(
        time=time(transition.unix_ms),
        version=transition.version,
        before=phase(transition.from_phase),
        phase=phase(transition.to_phase),
        reason=transition.reason,
        actor=transition.actor,
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
                by_position=_rates(counted.accepted_by_position, counted.proposed_by_position),
            )
    return None


def pinned(state: pb.SpeculatorState) -> int | None:
    """Return the pinned version (0: no draft), or None while nothing is pinned."""
    return state.pinned if state.HasField("pinned") else None


def phase(value: "pb.Phase.ValueType") -> str:
    """Return a phase in words: `stable`, `rolled back`; empty for none."""
    return "" if value == pb.PHASE_UNSPECIFIED else word(pb.Phase.Name(value))


def word(constant: str, prefix: str = "") -> str:
    """Turn PHASE_ROLLED_BACK into `rolled back`; a `prefix` of several words has to be named."""
    return constant.removeprefix(prefix or f"{constant.partition('_')[0]}_").replace("_", " ").lower()


def time(unix_ms: int) -> datetime:
    """Return a time of the wire."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC)


def _rates(accepted: Sequence[int], proposed: Sequence[int]) -> tuple[float, ...]:
    """Accepted of proposed by position; `accepted` may end where nothing was accepted any more."""
    padded = (*accepted, *([0] * len(proposed)))
    return tuple(yes / all_of for yes, all_of in zip(padded, proposed, strict=False) if all_of)


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

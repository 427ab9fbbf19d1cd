"""Versions of the registry as DraftVersion objects, and DraftVersions that a person applied as imports.

An object without a number in its spec is an import: it is a person's, and is never deleted from here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.draft_version import (
    DraftAcceptance,
    DraftVersion,
    DraftVersionStatus,
    Phase,
    PhaseChange,
    PodsStatus,
    Source,
)
from updraft_operator.manifests.manifest import Manifest, manifest
from updraft_operator.planning.acceptance import acceptance_length, decimal
from updraft_operator.planning.conditions import UndatedCondition
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.times import dated, moment, moment_ms

_PHASES = {
    pb.PHASE_PENDING: Phase.PENDING,
    pb.PHASE_HELD: Phase.HELD,
    pb.PHASE_CANARY: Phase.CANARY,
    pb.PHASE_STABLE: Phase.STABLE,
    pb.PHASE_SUPERSEDED: Phase.SUPERSEDED,
    pb.PHASE_REJECTED: Phase.REJECTED,
    pb.PHASE_ROLLED_BACK: Phase.ROLLED_BACK,
    pb.PHASE_FAILED: Phase.FAILED,
}
_SOURCES = {
    pb.SOURCE_INITIAL: Source.INITIAL,
    pb.SOURCE_TRAINER: Source.TRAINER,
    pb.SOURCE_IMPORTED: Source.IMPORTED,
}
CONDEMNED = {Phase.REJECTED, Phase.ROLLED_BACK, Phase.FAILED}
_MAX_HISTORY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftImport:
    """A DraftVersion that a person applied, and what became of it."""

    draft: DraftVersion
    job: Child | None
    number: int | None
    """Of the registry, once it is known."""
    failure: str
    """Why it failed; empty unless it did."""


def phase_name(number: pb.Phase.ValueType) -> Phase:
    """The API's word for a phase of the wire."""
    return _PHASES.get(number, Phase.PENDING)


def is_import(draft: DraftVersion) -> bool:
    """Whether a person applied it, for the registry to number."""
    return draft.spec.version is None


def number_of(observed: Observed, draft: DraftVersion) -> int | None:
    """Its number in the registry that is there now, if it has one; an import may have another's in its status."""
    return draft.spec.version or _import(observed, draft).number


def mirrors(observed: Observed) -> Iterator[Manifest]:
    """Objects of versions that have none yet. The registry may know what a Job imports before the Job has told."""
    if not observed.registry.is_connected:
        return
    brought = list(imports(observed))
    mirrored = {number_of(observed, draft) for draft in observed.drafts}
    running = [each.draft for each in brought if each.number is None and not each.failure]
    for version in observed.registry.versions:
        if version.version not in mirrored and not any(_may_be(version, draft) for draft in running):
            yield _mirror(observed, version)


def _may_be(version: pb.Version, draft: DraftVersion) -> bool:
    """Whether a version may be what an import brings that has not ended yet."""
    since = draft.metadata.creation_timestamp
    is_since = since is None or version.published_unix_ms >= since.timestamp() * 1000
    is_same = draft.spec.digest in (None, version.manifest.digest)
    return version.manifest.source == pb.SOURCE_IMPORTED and is_since and is_same


def outdated(observed: Observed) -> Iterator[str]:
    """Names of objects whose version the registry no longer keeps."""
    if not observed.registry.is_connected:
        return
    kept = {version.version for version in observed.registry.versions}
    for draft in observed.drafts:
        if not is_import(draft) and draft.spec.version not in kept and draft.metadata.deletion_timestamp is None:
            yield draft.metadata.name


def imports(observed: Observed) -> Iterator[DraftImport]:
    """What people brought."""
    for draft in observed.drafts:
        if is_import(draft):
            yield _import(observed, draft)


def job_name(draft: DraftVersion) -> str:
    """Of the Job that imports it; another object of the same name is another import."""
    return f"{draft.metadata.name[:40].rstrip('-.')}-import-{draft.metadata.uid[:8]}"


def statuses(observed: Observed, now: datetime) -> Iterator[tuple[DraftVersion, DraftVersionStatus]]:
    """What the status of each object should say."""
    by_number = {version.version: version for version in observed.registry.versions}
    found = {each.draft.metadata.name: each for each in imports(observed)}
    for draft in observed.drafts:
        brought = found.get(draft.metadata.name)
        number = draft.spec.version if brought is None else brought.number
        version = by_number.get(number or 0)
        if version is not None and observed.registry.is_connected:
            yield draft, _status(observed, draft, version, now)
        elif brought is not None and brought.number is None:
            yield draft, _import_status(brought, now)


def _import(observed: Observed, draft: DraftVersion) -> DraftImport:
    job = observed.children.get(Ref("Job", job_name(draft)))
    number, failure = _told_number(observed, draft), ""
    pods = [pod for pod in observed.pods_of(names.IMPORT) if pod.name.startswith(f"{job_name(draft)}-")]
    if number is None:
        number = next((said for pod in pods if (said := _said_version(pod.result))), None)
    if job is not None and number is None:
        for condition in job.status.get("conditions", ()):
            if condition["type"] == "Failed" and condition["status"] == "True":
                words = next((pod.problem.message for pod in pods if pod.problem), condition.get("message", ""))
                failure = words or "the import failed"
    if number is None and not failure and draft.status.phase is Phase.FAILED:
        failure = draft.status.reason or "the import failed"  # its Job is gone since
    return DraftImport(draft=draft, job=job, number=number, failure=failure)


def _told_number(observed: Observed, draft: DraftVersion) -> int | None:
    """Its number as the status has it, unless another registry gave it: there the content is another."""
    number = draft.status.version
    if number is None or not observed.registry.is_connected:
        return number
    version = next((each for each in observed.registry.versions if each.version == number), None)
    if version is None:
        newest = observed.registry.state.latest if observed.registry.state is not None else 0
        return number if number <= newest else None  # its weights are no longer kept; or a registry that began anew
    verified = next((each.message for each in draft.status.conditions if each.type == "Verified"), "")
    known = draft.spec.digest or verified
    return number if known in ("", version.manifest.digest) else None


def _said_version(result: str) -> int | None:
    try:
        return int(json.loads(result)["version"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _mirror(observed: Observed, version: pb.Version) -> Manifest:
    written, number = version.manifest, version.version
    learned = written.provenance
    training = {
        "samples": learned.samples,
        "firstTraceId": learned.first_trace_id,
        "lastTraceId": learned.last_trace_id,
    }
    spec = {
        "speculatorRef": {"name": observed.name},
        "source": _SOURCES.get(written.source, Source.TRAINER).value,
        "version": number,
        "digest": written.digest,
        **({"parentVersion": written.parent_version} if written.parent_version else {}),
        **({"training": {name: value for name, value in training.items() if value}} if learned.samples else {}),
        **({"retain": True} if version.retain else {}),
    }
    return manifest(
        observed.speculator,
        names.API_VERSION,
        "DraftVersion",
        names.draft_version(observed.name, number),
        "draft",
        spec=spec,
    )


def _status(observed: Observed, draft: DraftVersion, version: pb.Version, now: datetime) -> DraftVersionStatus:
    state, number = observed.registry.state, version.version
    assert state is not None
    phase = phase_name(version.phase)
    length, _ = acceptance_length(state, number)
    before = draft.status
    changes = [each for each in observed.registry.transitions if each.version == number]
    promoted = _promoted(changes) or before.promoted_time
    return DraftVersionStatus(
        observed_generation=draft.metadata.generation,
        version=number,
        phase=phase,
        reason=version.reason[:1024],
        pods=_pods(state, number),
        acceptance=DraftAcceptance(length=decimal(length)) if length is not None else before.acceptance,
        promoted_time=promoted,
        history=_history(changes) or before.history,
        conditions=dated(
            _conditions(observed, version, phase, promoted), before.conditions, draft.metadata.generation, now
        ),
    )


def _pods(state: pb.SpeculatorState, number: int) -> PodsStatus:
    pods = state.pods
    if number == state.stable:
        return PodsStatus(loaded=pods.serving_stable, target=pods.connected - pods.serving_candidate)
    if number == state.candidate:
        return PodsStatus(loaded=pods.serving_candidate)
    return PodsStatus(loaded=0, target=0)


def _history(changes: list[pb.Transition]) -> list[PhaseChange]:
    moved = [each for each in changes if each.to_phase and each.to_phase != each.from_phase]
    return [
        PhaseChange(
            time=moment(each.unix_ms / 1000),
            phase=phase_name(each.to_phase),
            actor=each.actor,
            reason=each.reason[:1024],
        )
        for each in moved[-_MAX_HISTORY:]
    ]


def _promoted(changes: list[pb.Transition]) -> datetime | None:
    won = [each for each in changes if each.to_phase == pb.PHASE_STABLE]
    return moment_ms(won[-1].unix_ms) if won else None


def _conditions(
    observed: Observed, version: pb.Version, phase: Phase, promoted: datetime | None
) -> list[UndatedCondition]:
    state = observed.registry.state
    assert state is not None
    number, evaluated = version.version, version.manifest.evaluation
    has_evidence = bool(evaluated.baseline_version or evaluated.lookahead)
    is_live = number in (state.stable, state.candidate)
    loaded = _pods(state, number).loaded or 0
    has_won = phase is Phase.STABLE or (phase is Phase.SUPERSEDED and promoted is not None)
    return [
        UndatedCondition(type="Verified", status="True", reason="DigestMatches", message=version.manifest.digest),
        UndatedCondition(
            type="Evaluated",
            status="True" if has_evidence else "Unknown",
            reason="HeldOutTraces" if has_evidence else "NotEvaluated",
            message="estimated on held-out requests" if has_evidence else "it came without an evaluation",
        ),
        UndatedCondition(
            type="Loaded",
            status="True" if is_live and loaded else "False",
            reason="Loaded" if is_live and loaded else "NotServing",
            message=f"{loaded} pods hold it" if is_live else "no pod is told to serve it",
        ),
        UndatedCondition(
            type="Promoted",
            status="True" if has_won else "False",
            reason="Promoted" if has_won else phase.value,
            message=version.reason[:1024],
        ),
    ]


def _import_status(brought: DraftImport, now: datetime) -> DraftVersionStatus:
    draft = brought.draft
    phase = Phase.FAILED if brought.failure else Phase.IMPORTING
    reason = brought.failure or "it is pulled into the registry"
    verdict = UndatedCondition(
        type="Verified",
        status="False" if brought.failure else "Unknown",
        reason="ImportFailed" if brought.failure else "Importing",
        message=reason[:1024],
    )
    return DraftVersionStatus(
        observed_generation=draft.metadata.generation,
        phase=phase,
        reason=reason[:1024],
        conditions=dated([verdict], draft.status.conditions, draft.metadata.generation, now),
    )

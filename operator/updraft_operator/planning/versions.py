"""The registry's versions as DraftVersion objects, and imports, which are DraftVersions of drafts from elsewhere.

An object without a version in its spec is an import: a user applied it, or named it in spec.draft.initial. The operator never
deletes it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.draft_version import (
    IMPORTING,
    DraftAcceptance,
    DraftVersion,
    DraftVersionStatus,
    PhaseChange,
    PodsStatus,
)
from updraft_operator.manifests.manifest import Manifest, manifest
from updraft_operator.planning.assessment import Assessment, dated
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed, acceptance_length, moment, moment_ms, phase_name
from updraft_rollouts.terms import Phase, Source

_MAX_HISTORY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftImport:
    """A DraftVersion of a draft from elsewhere, and the state of its import."""

    draft: DraftVersion
    number: int | None
    """Its version in the registry, once known."""
    failure: str
    """Why the import failed; empty otherwise."""

    @property
    def is_running(self) -> bool:
        return self.number is None and not self.failure


def is_import(draft: DraftVersion) -> bool:
    """Whether it is of a draft from elsewhere, so that the registry assigns the number."""
    return draft.spec.version is None


def number_of(observed: Observed, draft: DraftVersion) -> int | None:
    """Its number in the current registry, if any. The status of an import may have the number of an earlier registry."""
    return draft.spec.version or _import(observed, draft).number


def mirrors(observed: Observed) -> Iterator[Manifest]:
    """New DraftVersions for versions without one, except those that a running import may be about to report."""
    if not observed.registry.is_connected:
        return
    mirrored = {number_of(observed, draft) for draft in observed.drafts}
    running = [entry.draft for entry in imports(observed) if entry.is_running]
    for version in observed.registry.versions:
        if version.version not in mirrored and not any(_may_be(version, draft) for draft in running):
            yield _mirror(observed, version)


def _may_be(version: pb.Version, draft: DraftVersion) -> bool:
    since = draft.metadata.creation_timestamp
    is_since = since is None or version.published_unix_ms >= since.timestamp() * 1000
    return version.manifest.source == pb.SOURCE_IMPORTED and is_since


def outdated(observed: Observed) -> Iterator[str]:
    if not observed.registry.is_connected:
        return
    kept = {version.version for version in observed.registry.versions}
    for draft in observed.drafts:
        if not is_import(draft) and draft.spec.version not in kept and draft.metadata.deletion_timestamp is None:
            yield draft.metadata.name


def imports(observed: Observed) -> Iterator[DraftImport]:
    for draft in observed.drafts:
        if is_import(draft):
            yield _import(observed, draft)


def job_name(draft: DraftVersion) -> str:
    """Name of the Job that imports the draft. It contains the uid, because a new object of the same name is a new import."""
    return f"{draft.metadata.name[:40].rstrip('-.')}-import-{draft.metadata.uid[:8]}"


def statuses(observed: Observed, now: datetime) -> Iterator[tuple[DraftVersion, DraftVersionStatus]]:
    by_number = {version.version: version for version in observed.registry.versions}
    for draft in observed.drafts:
        draft_import = _import(observed, draft) if is_import(draft) else None
        number = draft.spec.version if draft_import is None else draft_import.number
        version = by_number.get(number or 0)
        if version is not None and observed.registry.is_connected:
            yield draft, _status(observed, draft, version, now)
        elif draft_import is not None and draft_import.number is None:
            yield draft, _import_status(draft_import, now)


def orphaned(draft: DraftVersion, now: datetime) -> DraftVersionStatus | None:
    """The status of an import whose AdaptiveSpeculator does not exist, perhaps not yet; None of others, which end with it."""
    if not is_import(draft) or draft.metadata.deletion_timestamp is not None:
        return None
    message = f"AdaptiveSpeculator {draft.spec.speculator_ref.name} does not exist in this namespace"
    ready = {"Ready": Assessment("False", "SpeculatorNotFound", message)}
    generation = draft.metadata.generation
    fields = {
        "observed_generation": generation,
        "conditions": dated(ready, draft.status.conditions, generation, now),
    }
    return draft.status.model_copy(update=fields)


def _import(observed: Observed, draft: DraftVersion) -> DraftImport:
    job = observed.children.get(Ref("Job", job_name(draft)))
    number, failure = _known_number(observed, draft), ""
    pods = [pod for pod in observed.pods_of(names.IMPORT) if pod.name.startswith(f"{job_name(draft)}-")]
    if number is None:
        number = next((version for pod in pods if (version := _result_version(pod.result))), None)
    if job is not None and number is None:
        for condition in job.status.get("conditions", ()):
            if condition["type"] == "Failed" and condition["status"] == "True":
                message = next((pod.problem.message for pod in pods if pod.problem), condition.get("message", ""))
                failure = message or "the import failed"
    if number is None and not failure and draft.status.phase == Phase.FAILED:
        failure = draft.status.reason or "the import failed"  # its Job has been deleted
    return DraftImport(draft=draft, number=number, failure=failure)


def _known_number(observed: Observed, draft: DraftVersion) -> int | None:
    """The number in its status, unless a different registry assigned it: the digest that its version had differs then.

    That is not `spec.digest`, because a draft in another layout is converted, and its weights are in another file then.
    """
    number = draft.status.version
    if number is None or not observed.registry.is_connected:
        return number
    version = next((candidate for candidate in observed.registry.versions if candidate.version == number), None)
    if version is None:
        newest = observed.registry.state.latest if observed.registry.state is not None else 0
        return number if number <= newest else None  # pruned, or a new registry
    verified = next((condition.message for condition in draft.status.conditions if condition.type == "Verified"), "")
    return number if verified in ("", version.manifest.digest) else None


def _result_version(result: str) -> int | None:
    try:
        return int(json.loads(result)["version"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _mirror(observed: Observed, version: pb.Version) -> Manifest:
    published, number = version.manifest, version.version
    provenance = published.provenance
    training = {
        "samples": provenance.samples,
        "firstTraceId": provenance.first_trace_id,
        "lastTraceId": provenance.last_trace_id,
    }
    spec = {
        "speculatorRef": {"name": observed.name},
        "source": (Source.from_proto(published.source) or Source.TRAINER).value,
        "version": number,
        "digest": published.digest,
        **({"parentVersion": published.parent_version} if published.parent_version else {}),
        **({"training": {name: value for name, value in training.items() if value}} if provenance.samples else {}),
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
    transitions = [transition for transition in observed.registry.transitions if transition.version == number]
    promoted = _promoted(transitions) or before.promoted_time
    return DraftVersionStatus(
        observed_generation=draft.metadata.generation,
        version=number,
        phase=phase.value,
        reason=version.reason[:1024],
        pods=_pods(state, number),
        acceptance=DraftAcceptance(length=f"{length:.2f}") if length is not None else before.acceptance,
        promoted_time=promoted,
        history=_history(transitions) or before.history,
        conditions=dated(
            _conditions(state, version, is_promoted=promoted is not None),
            before.conditions,
            draft.metadata.generation,
            now,
        ),
    )


def _pods(state: pb.SpeculatorState, number: int) -> PodsStatus:
    pods = state.pods
    if number == state.stable:
        return PodsStatus(loaded=pods.serving_stable, target=pods.connected - pods.serving_candidate)
    if number == state.candidate:
        return PodsStatus(loaded=pods.serving_candidate)
    return PodsStatus(loaded=0, target=0)


def _history(transitions: list[pb.Transition]) -> list[PhaseChange]:
    changes = [change for change in transitions if change.to_phase and change.to_phase != change.from_phase]
    return [
        PhaseChange(
            time=moment(change.unix_ms / 1000),
            phase=phase_name(change.to_phase).value,
            actor=change.actor,
            reason=change.reason[:1024],
        )
        for change in changes[-_MAX_HISTORY:]
    ]


def _promoted(transitions: list[pb.Transition]) -> datetime | None:
    promotions = [transition for transition in transitions if transition.to_phase == pb.PHASE_STABLE]
    return moment_ms(promotions[-1].unix_ms) if promotions else None


def _conditions(state: pb.SpeculatorState, version: pb.Version, *, is_promoted: bool) -> dict[str, Assessment]:
    phase, evaluation = phase_name(version.phase), version.manifest.evaluation
    is_live, loaded = version.version in (state.stable, state.candidate), _pods(state, version.version).loaded or 0
    evaluated = Assessment("Unknown", "NotEvaluated", "published without an evaluation")
    if evaluation.baseline_version or evaluation.lookahead:
        evaluated = Assessment("True", "HeldOutTraces", "evaluated on held-out requests")
    message = f"{loaded} pods have loaded it" if is_live else "no pod should serve it"
    is_winner = phase is Phase.STABLE or (phase is Phase.SUPERSEDED and is_promoted)
    return {
        "Ready": Assessment("True", "Registered", f"version {version.version} of the registry"),
        "Verified": Assessment("True", "DigestMatches", version.manifest.digest),
        "Evaluated": evaluated,
        "Loaded": Assessment("True", "Loaded", message)
        if is_live and loaded
        else Assessment("False", "NotServing", message),
        "Promoted": Assessment("True", "Promoted", version.reason[:1024])
        if is_winner
        else Assessment("False", phase.value, version.reason[:1024]),
    }


def _import_status(draft_import: DraftImport, now: datetime) -> DraftVersionStatus:
    draft, failure = draft_import.draft, draft_import.failure[:1024]
    verified = Assessment("Unknown", "Importing", "importing the draft into the registry")
    ready, stalled = verified._replace(status="False"), {}
    if failure:
        verified = ready = Assessment("False", "ImportFailed", failure)
        stalled = {"Stalled": ready._replace(status="True")}
    return DraftVersionStatus(
        observed_generation=draft.metadata.generation,
        phase=Phase.FAILED.value if failure else IMPORTING,
        reason=verified.message,
        conditions=dated(
            {"Ready": ready, "Verified": verified, **stalled},
            draft.status.conditions,
            draft.metadata.generation,
            now,
        ),
    )

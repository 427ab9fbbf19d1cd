"""The registry's versions as DraftVersion objects."""

from collections.abc import Iterator
from datetime import datetime

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.api import names
from updraft_operator.api.draft_version import (
    DraftAcceptance,
    DraftVersion,
    DraftVersionStatus,
    PhaseChange,
    PodsStatus,
)
from updraft_operator.manifests.manifest import Manifest, manifest
from updraft_operator.planning import imports
from updraft_operator.planning.assessment import Assessment, dated
from updraft_operator.planning.observed import Observed, acceptance_length, moment, moment_ms, phase_name
from updraft_rollouts.terms import Phase, Source

_MAX_HISTORY = 20


def mirrors(observed: Observed) -> Iterator[Manifest]:
    """New DraftVersions for versions without one."""
    if not observed.registry.is_connected:
        return
    mirrored = {draft.spec.version for draft in observed.drafts}
    for version in observed.registry.versions:
        if version.version not in mirrored:
            yield _mirror(observed, version)


def outdated(observed: Observed) -> Iterator[str]:
    if not observed.registry.is_connected:
        return
    kept = {version.version for version in observed.registry.versions}
    for draft in observed.drafts:
        if draft.spec.version not in kept and draft.metadata.deletion_timestamp is None:
            yield draft.metadata.name


def statuses(observed: Observed, now: datetime) -> Iterator[tuple[DraftVersion, DraftVersionStatus]]:
    if not observed.registry.is_connected:
        return
    by_number = {version.version: version for version in observed.registry.versions}
    done = [
        (state.registered.version, state.draft_import.metadata)
        for state in imports.states(observed)
        if state.registered
    ]
    oldest_last = sorted(done, key=lambda one: (str(one[1].creation_timestamp), one[1].name), reverse=True)
    origins = {number: metadata.name for number, metadata in oldest_last}
    for draft in observed.drafts:
        version = by_number.get(draft.spec.version)
        if version is not None:
            yield draft, _status(observed, draft, version, origins.get(draft.spec.version), now)


def orphaned(draft: DraftVersion, now: datetime) -> DraftVersionStatus | None:
    """The status of one that no AdaptiveSpeculator owns and that names none; None if it is about to be deleted."""
    if draft.metadata.deletion_timestamp is not None:
        return None
    ready, generation = imports.without_speculator(draft.spec.speculator_ref.name), draft.metadata.generation
    both = {"Ready": ready, "Stalled": ready._replace(status="True")}
    conditions = dated(both, draft.status.conditions, generation, now)
    return draft.status.model_copy(update={"observed_generation": generation, "conditions": conditions})


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


def _status(
    observed: Observed, draft: DraftVersion, version: pb.Version, origin: str | None, now: datetime
) -> DraftVersionStatus:
    state, number = observed.registry.state, version.version
    assert state is not None
    phase = phase_name(version.phase)
    length, _ = acceptance_length(state, number)
    before = draft.status
    transitions = [transition for transition in observed.registry.transitions if transition.version == number]
    promoted = _promoted(transitions) or before.promoted_time
    return DraftVersionStatus(
        observed_generation=draft.metadata.generation,
        draft_import_name=before.draft_import_name or origin,  # that stays if the import is deleted
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

"""Drafts from elsewhere: the Job that imports each, the version that it became, and the status of its DraftImport.

An import has one Job at a time, whose name is another one for another spec or speculator, and after a Job whose result was
lost. The registry gives the same weights the same version, so an import that is repeated is one version.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport, DraftImportStatus
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import importing
from updraft_operator.manifests.manifest import Manifest, digest
from updraft_operator.planning.assessment import Assessment, dated, false, true
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed, RegistryView
from updraft_operator.planning.pods import PodState

FAILED = "ImportFailed"

_STALLED = (FAILED, "InvalidPodTemplate")
"""Reasons that only a person can end."""


MOST_ATTEMPTS = 5
"""Jobs of one import, of which each was complete and its result was lost."""


class Registered(NamedTuple):
    """A version of a registry, and the digest of its weights: another registry may have another draft under its number."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportState:
    """A DraftImport, and what became of it."""

    draft_import: DraftImport
    job: Ref
    """Its current Job, which may not exist."""
    registered: Registered | None
    """Its version in the current registry, once known."""
    failure: str
    """Why the import failed; empty otherwise."""
    pods: tuple[PodState, ...]
    """Those of its Job."""

    @property
    def is_running(self) -> bool:
        return self.registered is None and not self.failure

    @property
    def problem(self) -> str:
        """A problem of its pods, such as a missing Secret; empty without one."""
        return next((pod.problem.message for pod in self.pods if pod.problem), "")


def states(observed: Observed) -> Iterator[ImportState]:
    for draft_import in observed.imports:
        first = job_name(observed.speculator, draft_import)
        attempt = _attempt(observed, draft_import, first)
        state = _state(observed, draft_import, Ref("Job", _numbered(first, attempt)))
        job = observed.children.get(state.job)
        if job is None or not (observed.registry.is_connected and _is_lost(job, state)) or _was_read(state):
            yield state
        elif attempt < MOST_ATTEMPTS:
            yield replace(state, job=Ref("Job", _numbered(first, attempt + 1)))
        else:
            lost = f"{attempt} Jobs were complete, and the result of each was lost with its pod"
            yield replace(state, failure=f"{lost}; delete the import and create it again, or change secretRef")


def _state(observed: Observed, draft_import: DraftImport, job: Ref) -> ImportState:
    pods = tuple(pod for pod in observed.pods_of(names.IMPORT) if pod.name.startswith(f"{job.name}-"))
    registered = _registered(observed.registry, draft_import, pods)
    state = ImportState(draft_import=draft_import, job=job, registered=registered, failure="", pods=pods)
    return state if registered else replace(state, failure=_failure(observed.children.get(job), state))


def _attempt(observed: Observed, draft_import: DraftImport, first: str) -> int:
    """The number of the latest Job, by the status and the Jobs that exist."""
    known = {draft_import.status.job_name, *(child.name for child in observed.children if child.kind == "Job")}
    return max((number for number in range(1, MOST_ATTEMPTS + 1) if _numbered(first, number) in known), default=1)


def _numbered(first: str, attempt: int) -> str:
    return first if attempt == 1 else f"{first}-{attempt}"


def jobs(observed: Observed) -> Iterator[Manifest]:
    """The Jobs of imports that are not done; none while the registry is away."""
    if not observed.registry.is_connected:
        return
    is_first = not observed.registry.versions
    for state in states(observed):
        draft_import = state.draft_import
        if state.is_running and draft_import.metadata.deletion_timestamp is None:
            yield importing.job(observed.speculator, draft_import, state.job.name, observed.config, is_first=is_first)


def outdated(observed: Observed) -> Iterator[Ref]:
    """Jobs of an earlier spec, speculator or attempt, and those whose version was in an earlier registry: without the Job,
    another one runs."""
    current = {state.job: state for state in states(observed)}
    uids = {state.draft_import.metadata.uid for state in current.values()}
    for child in observed.children.values():
        if child.ref.kind != "Job" or child.owner_uid not in uids or child.is_ending:
            continue
        state = current.get(child.ref)
        if state is None or (observed.registry.is_connected and _is_lost(child, state)):
            yield child.ref


def _is_lost(job: Child, state: ImportState) -> bool:
    return state.is_running and bool(_condition(job, "Complete")) and all(pod.is_finished for pod in state.pods)


def _was_read(state: ImportState) -> bool:
    """Whether there was a result, which the registry does not have, or not yet: then the same Job runs again."""
    return bool(state.draft_import.status.version) or any(_result(pod.result) for pod in state.pods)


def job_name(owner: AdaptiveSpeculator, draft_import: DraftImport) -> str:
    """Name of its first Job: another one for a new object of the same name, a changed one, and another speculator."""
    metadata = draft_import.metadata
    identity = digest({"import": metadata.uid, "spec": metadata.generation, "speculator": owner.metadata.uid})
    return f"{metadata.name[:40].rstrip('-.')}-import-{identity[:8]}"


def statuses(observed: Observed, now: datetime) -> Iterator[tuple[DraftImport, DraftImportStatus]]:
    for state in states(observed):
        status = _status(state.draft_import, state.registered, _ready(observed, state), now)
        yield state.draft_import, status.model_copy(update={"job_name": state.job.name})


def orphaned(draft_import: DraftImport, now: datetime) -> DraftImportStatus | None:
    """The status while its AdaptiveSpeculator does not exist, perhaps not yet; None if it is done or about to be deleted."""
    if draft_import.status.version or draft_import.metadata.deletion_timestamp is not None:
        return None
    return _status(draft_import, None, without_speculator(draft_import.spec.speculator_ref.name), now)


def without_speculator(name: str) -> Assessment:
    """The condition Ready of an object whose AdaptiveSpeculator does not exist."""
    return false("SpeculatorNotFound", f"AdaptiveSpeculator {name} does not exist in this namespace")


def _registered(view: RegistryView, draft_import: DraftImport, pods: Iterable[PodState]) -> Registered | None:
    """Find the version in the status or in the result of a pod, if the registry has it; without a registry, in the status."""
    before = draft_import.status
    known = Registered(before.version, before.digest) if before.version and before.digest else None
    if not view.is_connected:
        return known
    answers = (known, *(_result(pod.result) for pod in pods))
    return next((answer for answer in answers if answer is not None and _has(view, answer)), None)


def _has(view: RegistryView, registered: Registered) -> bool:
    """Whether the registry has the version, or had it and no longer keeps it."""
    kept = next((version for version in view.versions if version.version == registered.version), None)
    if kept is not None:
        return kept.manifest.digest == registered.digest
    return view.state is not None and registered.version <= view.state.latest


def _result(result: str) -> Registered | None:
    try:
        content = json.loads(result)
        return Registered(int(content["version"]), str(content["digest"]))
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _failure(job: Child | None, state: ImportState) -> str:
    """Why the current Job failed. The status is asked first, because pods and Job are deleted in time."""
    status = state.draft_import.status
    for condition in status.conditions:
        if (condition.type, condition.reason, status.job_name) == ("Ready", FAILED, state.job.name):
            return condition.message
    failed = None if job is None else _condition(job, "Failed")
    return str(state.problem or failed.get("message") or "the import failed") if failed else ""


def _condition(job: Child, kind: str) -> Mapping[str, Any] | None:
    conditions: Iterable[Mapping[str, Any]] = job.status.get("conditions", ())
    return next((each for each in conditions if (each["type"], each["status"]) == (kind, "True")), None)


def _ready(observed: Observed, state: ImportState) -> Assessment:
    if state.registered is not None:
        number, kept = state.registered.version, {version.version for version in observed.registry.versions}
        is_pruned = observed.registry.is_connected and number not in kept
        return true("Imported", f"imported as version {number}{', which is no longer kept' if is_pruned else ''}")
    if state.failure:
        return false(FAILED, state.failure)
    if refusal := next((refusal for refusal in observed.refusals if refusal.ref == state.job), None):
        return false(refusal.reason, refusal.message)
    if state.job not in observed.children and not observed.registry.is_connected:
        return false("WaitingForRegistry", "the import starts when the registry answers")
    return false("Importing", state.problem or "a Job imports the draft into the registry")


def _status(
    draft_import: DraftImport, registered: Registered | None, ready: Assessment, now: datetime
) -> DraftImportStatus:
    stalled = {"Stalled": ready._replace(status="True")} if ready.reason in _STALLED else {}
    generation = draft_import.metadata.generation
    return DraftImportStatus(
        observed_generation=generation,
        version=registered.version if registered else None,
        digest=registered.digest if registered else None,
        conditions=dated({"Ready": ready, **stalled}, draft_import.status.conditions, generation, now),
    )

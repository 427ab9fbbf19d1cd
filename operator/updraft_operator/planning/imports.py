"""Drafts from elsewhere: the Job that imports each, the version that it became, and the status of its DraftImport.

A Job is made once per generation of a DraftImport. The registry gives the same weights the same version, so an import that is
done twice, for instance after a Job whose result is lost, is one version.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport, DraftImportStatus
from updraft_operator.manifests import importing
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.planning.assessment import Assessment, dated, false, true
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed, RegistryView
from updraft_operator.planning.pods import PodState

FAILED = "ImportFailed"


class Registered(NamedTuple):
    """A version of a registry, and the digest of its weights: another registry may have another draft under its number."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportState:
    """A DraftImport, and what became of it."""

    draft_import: DraftImport
    registered: Registered | None
    """Its version in the current registry, once known."""
    failure: str
    """Why the import failed; empty otherwise."""
    problem: str
    """A problem of its pod, such as a missing Secret; empty without one."""

    @property
    def is_running(self) -> bool:
        return self.registered is None and not self.failure


def states(observed: Observed) -> Iterator[ImportState]:
    for draft_import in observed.imports:
        name = job_name(draft_import)
        pods = [pod for pod in observed.pods_of(names.IMPORT) if pod.name.startswith(f"{name}-")]
        registered = _registered(observed.registry, draft_import, pods)
        problem = next((pod.problem.message for pod in pods if pod.problem), "")
        failure = "" if registered else _failure(observed.children.get(Ref("Job", name)), draft_import, problem)
        yield ImportState(draft_import=draft_import, registered=registered, failure=failure, problem=problem)


def jobs(observed: Observed) -> Iterator[Manifest]:
    """The Jobs of imports that are not done; none while the registry is away."""
    if not observed.registry.is_connected:
        return
    is_first = not observed.registry.versions
    for state in states(observed):
        draft_import = state.draft_import
        if state.is_running and draft_import.metadata.deletion_timestamp is None:
            name = job_name(draft_import)
            yield importing.job(observed.speculator, draft_import, name, observed.config, is_first=is_first)


def job_name(draft_import: DraftImport) -> str:
    """Name of the Job. With uid and generation, because a new object of the same name, or a changed one, is a new import."""
    metadata = draft_import.metadata
    return f"{metadata.name[:36].rstrip('-.')}-import-{metadata.uid[:8]}-{metadata.generation}"


def statuses(observed: Observed, now: datetime) -> Iterator[tuple[DraftImport, DraftImportStatus]]:
    for state in states(observed):
        ready = _ready(observed, state)
        yield state.draft_import, _status(state.draft_import, state.registered, ready, now)


def orphaned(draft_import: DraftImport, now: datetime) -> DraftImportStatus | None:
    """The status while its AdaptiveSpeculator does not exist, perhaps not yet; None if it is about to be deleted."""
    if draft_import.metadata.deletion_timestamp is not None:
        return None
    before, name = draft_import.status, draft_import.spec.speculator_ref.name
    registered = Registered(before.version, before.digest) if before.version and before.digest else None
    ready = false("SpeculatorNotFound", f"AdaptiveSpeculator {name} does not exist in this namespace")
    return _status(draft_import, registered, ready, now)


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


def _failure(job: Child | None, draft_import: DraftImport, problem: str) -> str:
    for condition in job.status.get("conditions", ()) if job is not None else ():
        if condition["type"] == "Failed" and condition["status"] == "True":
            return str(problem or condition.get("message") or "the import failed")
    for known in draft_import.status.conditions:  # its Job may have been deleted
        if (known.type, known.reason, known.observed_generation) == ("Ready", FAILED, draft_import.metadata.generation):
            return known.message
    return ""


def _ready(observed: Observed, state: ImportState) -> Assessment:
    if state.registered is not None:
        return true("Imported", f"imported as version {state.registered.version}")
    if state.failure:
        return false(FAILED, state.failure)
    job = Ref("Job", job_name(state.draft_import))
    if refusal := next((refusal for refusal in observed.refusals if refusal.ref == job), None):
        return false(refusal.reason, refusal.message)
    if job not in observed.children:
        return false("WaitingForRegistry", "the import starts when the registry answers")
    return false("Importing", state.problem or "a Job imports the draft into the registry")


def _status(
    draft_import: DraftImport, registered: Registered | None, ready: Assessment, now: datetime
) -> DraftImportStatus:
    stalled = {"Stalled": ready._replace(status="True")} if ready.reason == FAILED else {}
    generation = draft_import.metadata.generation
    return DraftImportStatus(
        observed_generation=generation,
        version=registered.version if registered else None,
        digest=registered.digest if registered else None,
        conditions=dated({"Ready": ready, **stalled}, draft_import.status.conditions, generation, now),
    )

"""Completes Kubernetes' view by the report of a registry about a speculator, its versions and pods. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from updraft_cli.backends.drafts import Draft, DraftDetails
from updraft_cli.backends.snapshot import PodDetails, PodState, SpeculatorSnapshot
from updraft_cli.backends.speculators import Speculator

_NOT_SERVING = frozenset({"failed", "waiting", "disconnected"})
"""States of a registry that say more than that the pod is ready."""


def joined(ours: SpeculatorSnapshot, reported: SpeculatorSnapshot) -> SpeculatorSnapshot:
    """`ours` is what Kubernetes knows, whose resource decides."""
    return replace(
        ours,
        speculator=_speculator(ours.speculator, reported.speculator),
        drafts=tuple(_drafts(ours.drafts, reported.drafts)),
        history=reported.history or ours.history,
        pods=tuple(_pods(ours.pods, reported.pods)) if not ours.pods_problem else reported.pods,
        pods_problem="" if reported.pods else ours.pods_problem,
    )


def _speculator(ours: Speculator, reported: Speculator) -> Speculator:
    is_same_trial = reported.trial is not None and reported.trial.candidate == ours.candidate
    return replace(
        ours,
        pods=replace(ours.pods, serving_candidate=reported.pods.serving_candidate),
        acceptance=reported.acceptance or ours.acceptance,
        domains=reported.domains or ours.domains,
        speedup=reported.speedup or ours.speedup,
        trial=reported.trial if is_same_trial else ours.trial,
        traffic=reported.traffic,
        capture_problem=reported.capture_problem,
        trainer_message=reported.trainer_message or ours.trainer_message,
        learning=reported.learning,
        pace=reported.pace or ours.pace,
        pin_reason=reported.pin_reason if ours.pinned is not None else "",
        pause_reason=reported.pause_reason if ours.paused else "",
    )


def _drafts(ours: Iterable[Draft], reported: Iterable[Draft]) -> Iterator[Draft]:
    by_number = {draft.version: draft for draft in reported}
    for draft in ours:
        other = by_number.get(draft.version)
        yield draft if other is None else with_report(draft, other)


def with_report(ours: Draft, reported: Draft) -> Draft:
    return replace(
        ours, acceptance=reported.acceptance or ours.acceptance, step=reported.step, size_bytes=reported.size_bytes
    )


def details(ours: DraftDetails, reported: DraftDetails) -> DraftDetails:
    """Return all that the registry knows of a version, with the phase of its resource."""
    return replace(reported, draft=with_report(ours.draft, reported.draft))


def _pods(ours: Iterable[PodState], reported: Iterable[PodState]) -> Iterator[PodState]:
    by_name = {pod.name: pod for pod in reported}
    for pod in ours:
        other = by_name.get(pod.name)
        yield pod if other is None else _pod(pod, other)


def _pod(ours: PodState, reported: PodState) -> PodState:
    is_known_better = ours.state == "ready" and reported.state in _NOT_SERVING
    return replace(
        reported,
        state=reported.state if is_known_better else ours.state,
        problem=ours.problem or reported.problem,
        requested_device=ours.requested_device,
        node=ours.node,
        restarts=ours.restarts,
        started=ours.started,
    )


def pod_details(ours: PodDetails, reported: PodDetails) -> PodDetails:
    return replace(
        ours,
        pod=_pod(ours.pod, reported.pod),
        traffic=reported.traffic,
        speedup=reported.speedup,
        capture_problem=reported.capture_problem,
    )

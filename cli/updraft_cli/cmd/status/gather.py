"""The state of a running installation, gathered in one look: processes, drafts, serving, capture, training.

Every part may be away; then it is None, and the others are still told.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import Unavailable
from updraft_cli.backends import registry
from updraft_cli.backends.drafts import Acceptance, acceptance_of, draft, pinned
from updraft_cli.backends.registry import Target
from updraft_cli.cmd.status.scrape import Scrape, scrape
from updraft_cli.local.data_folder import ProcessState, StackState


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of local mode."""

    name: str
    state: str
    pid: int | None
    restarts: int
    address: str
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionAcceptance:
    """A version that serves or served, with its live acceptance; version 0 is no draft of the registry's."""

    version: int
    phase: str
    acceptance: Acceptance


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculator:
    """What the registry says of one speculator; 0 = no draft."""

    name: str
    stable: int
    candidate: int
    latest: int
    pinned: int | None
    message: str
    pods: int
    traffic: tuple[VersionAcceptance, ...]
    capture_problem: str = ""
    """Which pod captures nothing, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What the inference process says of itself, since its start."""

    draft_version: int
    swaps: int
    running_requests: int
    queued_requests: int
    output_tokens: int
    acceptance_length: dict[str, float]
    """Tokens a verify step by drafter, the mean over requests."""
    expected_survival: dict[str, dict[str, float]]
    """By drafter and position in the chain, how probable it is that the drafts up to there are kept; what lookahead goes by."""
    verify_ms: dict[str, float]
    """Milliseconds of a verify step by the rows that it reads."""
    captured: int
    capture_dropped: dict[str, int]
    """Traces by the reason why they were not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What the trainer says of itself, since its start."""

    optimizer_steps: int
    trained_tokens: int
    samples: dict[str, int]
    """Samples taken, by split: to train on, to evaluate on."""
    loss: float | None
    acceptance_length: dict[str, float]
    """Tokens a verify step on held-out requests, of candidate and baseline."""
    published: dict[str, int]
    """Candidates by what became of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """All of it."""

    processes: tuple[Process, ...]
    speculators: tuple[Speculator, ...] | None
    serving: Serving | None
    training: Training | None


async def gather(state: StackState | None, target: Target, inference_url: str) -> Status:
    """Ask everyone; Unavailable when nothing at all answers."""
    urls = state.metrics_urls if state else {}
    inference = scrape(f"{inference_url}/metrics")
    trainer = scrape(urls["trainer"]) if "trainer" in urls else None
    status = Status(
        processes=tuple(map(_process, state.processes)) if state else (),
        speculators=await _speculators(target),
        serving=serving(inference) if inference else None,
        training=training(trainer) if trainer else None,
    )
    if not status.processes and status.speculators is None and status.serving is None:
        raise Unavailable(
            f"nothing runs: no stack on the data folder, no registry at {target.registry}, no inference at"
            f" {inference_url}; start it all with `updraft up`"
        )
    return status


def speculator(state: pb.SpeculatorState, versions: Sequence[pb.Version]) -> Speculator:
    """Return what the registry says of one speculator."""
    phases = {version.version: draft(version).phase for version in versions}
    rows = ((counted.version, acceptance_of(counted.version, state.traffic)) for counted in state.traffic)
    return Speculator(
        name=state.speculator,
        stable=state.stable,
        candidate=state.candidate,
        latest=state.latest,
        pinned=pinned(state),
        message=state.message,
        pods=state.pods.connected,
        traffic=tuple(
            VersionAcceptance(version=version, phase=phases.get(version, "no draft"), acceptance=acceptance)
            for version, acceptance in rows
            if acceptance is not None
        ),
        capture_problem=state.capture_problem,
    )


def serving(metrics: Scrape) -> Serving:
    """Return what the metrics of an inference process say."""
    prefix = "updraft_inference"
    tokens = metrics.by(f"{prefix}_acceptance_length_tokens_sum", "drafter")
    requests = metrics.by(f"{prefix}_acceptance_length_tokens_count", "drafter")
    return Serving(
        draft_version=_count(metrics, f"{prefix}_draft_version"),
        swaps=_count(metrics, f"{prefix}_swaps_total", outcome="swapped"),
        running_requests=_count(metrics, f"{prefix}_running_requests"),
        queued_requests=_count(metrics, f"{prefix}_queued_requests"),
        output_tokens=_count(metrics, f"{prefix}_output_tokens_total"),
        acceptance_length={name: tokens[name] / count for name, count in requests.items() if count},
        expected_survival={
            drafter: known
            for drafter in metrics.by(f"{prefix}_expected_survival_ratio", "drafter")
            if (known := _known(metrics.by(f"{prefix}_expected_survival_ratio", "position", drafter=drafter)))
        },
        verify_ms={rows: 1e3 * s for rows, s in metrics.by(f"{prefix}_verify_seconds", "rows").items()},
        captured=_count(metrics, f"{prefix}_captured_traces_total"),
        capture_dropped=_counts(metrics, f"{prefix}_capture_dropped_traces_total", "reason"),
    )


def training(metrics: Scrape) -> Training:
    """Return what the metrics of a trainer say."""
    prefix = "updraft_trainer"
    steps = _count(metrics, f"{prefix}_optimizer_steps_total")
    return Training(
        optimizer_steps=steps,
        trained_tokens=_count(metrics, f"{prefix}_trained_rows_total"),
        samples=_counts(metrics, f"{prefix}_samples_admitted_total", "split"),
        loss=metrics.total(f"{prefix}_loss") if steps else None,
        acceptance_length=metrics.by(f"{prefix}_acceptance_length_tokens", "role"),
        published=_counts(metrics, f"{prefix}_publishes_total", "outcome"),
    )


def _known(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


async def _speculators(target: Target) -> tuple[Speculator, ...] | None:
    try:
        async with target.connected() as stub:
            answer = await registry.listing(stub, "")
    except Unavailable:
        return None
    return tuple(
        speculator(state, [v for v in answer.versions if v.manifest.speculator == state.speculator])
        for state in answer.speculators
    )


def _process(process: ProcessState) -> Process:
    return Process(**process.model_dump())


def _count(metrics: Scrape, name: str, **labels: str) -> int:
    return int(metrics.total(name, **labels) or 0)


def _counts(metrics: Scrape, name: str, label: str) -> dict[str, int]:
    return {value: int(count) for value, count in metrics.by(name, label).items() if count}

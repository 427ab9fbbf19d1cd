"""The processes on this machine: those of `updraft up`, and what serving and training tell about themselves."""

import math

from updraft_cli.backends.installation import Installation, Serving, Training
from updraft_cli.local.data_folder import StackState
from updraft_cli.local.scrape import Scrape, scrape

INFERENCE_URL = "http://127.0.0.1:8000"
TRAINER_METRICS_URL = "http://127.0.0.1:9092/metrics"
"""Where `updraft up` starts them unless the ports are taken."""


def gather(state: StackState | None, inference_url: str | None) -> Installation:
    """Look at the processes of a stack; without one, at the default addresses. Speculators are not read here."""
    inference = scrape(_metrics_url(state, inference_url))
    trainer = scrape(state.metrics_urls["trainer"] if state else TRAINER_METRICS_URL)
    return Installation(
        processes=state.processes if state else (),
        speculators=None,
        serving=serving(inference) if inference and inference.has("updraft_inference_") else None,
        training=training(trainer) if trainer and trainer.has("updraft_trainer_") else None,
    )


def _metrics_url(state: StackState | None, inference_url: str | None) -> str:
    if state is not None and inference_url is None:
        return state.metrics_urls["inference"]
    return f"{inference_url or INFERENCE_URL}/metrics"


def serving(metrics: Scrape) -> Serving:
    prefix = "updraft_inference"
    tokens = metrics.by(f"{prefix}_acceptance_length_tokens_sum", "drafter")
    requests = metrics.by(f"{prefix}_acceptance_length_tokens_count", "drafter")
    return Serving(
        kernels=next(iter(metrics.by(f"{prefix}_own_kernels", "variant")), ""),
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


def _count(metrics: Scrape, name: str, **labels: str) -> int:
    return int(metrics.total(name, **labels) or 0)


def _counts(metrics: Scrape, name: str, label: str) -> dict[str, int]:
    return {value: int(count) for value, count in metrics.by(name, label).items() if count}

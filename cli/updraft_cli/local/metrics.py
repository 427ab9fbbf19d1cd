"""The metrics of an inference process and of a trainer, as plain values."""

import math

from updraft_cli.backends.installation import Serving, Training
from updraft_cli.local.scrape import Scrape


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
        lookahead=metrics.total(f"{prefix}_lookahead_tokens"),
        granted_tokens_per_s=metrics.total(f"{prefix}_capture_granted_tokens_per_second"),
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
        gain=_known(metrics.by(f"{prefix}_gain_ratio", "bound")),
        trained_length=metrics.total(f"{prefix}_trained_acceptance_length_tokens"),
        replay=_counts(metrics, f"{prefix}_replay_samples", "place"),
        lag_s=max(metrics.by(f"{prefix}_stream_lag_seconds", "shard").values(), default=None),
        demand_tokens_per_s=metrics.total(f"{prefix}_demand_tokens_per_second"),
        refused=_counts(metrics, f"{prefix}_samples_refused_total", "reason"),
    )


def _known(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _count(metrics: Scrape, name: str, **labels: str) -> int:
    total = metrics.total(name, **labels) or 0.0
    return int(total) if math.isfinite(total) else 0


def _counts(metrics: Scrape, name: str, label: str) -> dict[str, int]:
    counts = metrics.by(name, label).items()
    return {value: int(count) for value, count in counts if count and math.isfinite(count)}

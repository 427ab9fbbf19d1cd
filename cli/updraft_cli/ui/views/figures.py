"""The numbers of one moment that the charts follow, by name."""

import math
from collections.abc import Iterator

from updraft_cli.backends.installation import Installation
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import MetricChange, Speculator

DOMAIN = "domain "
"""Prefix of the names with the acceptance length of one domain."""
DROPPED = "dropped "
"""Prefix of the names with the dropped traces for one reason, since the start of the pod."""


def figures(one: SpeculatorSnapshot, installation: Installation) -> dict[str, float]:
    return dict(
        (
            *_rollout(one.speculator),
            *_learning(one.speculator),
            *(_processes(installation) if installation.processes is not None else ()),
        )
    )


def _rollout(speculator: Speculator) -> Iterator[tuple[str, float]]:
    if speculator.acceptance is not None:
        yield "stable", speculator.acceptance.length
    for domain in speculator.domains:
        if domain.stable is not None:
            yield f"{DOMAIN}{domain.domain}", domain.stable
    if (speedup := speculator.speedup) is not None:
        yield from (("speedup", speedup.ratio), ("speedup low", speedup.low), ("speedup high", speedup.high))
    if (trial := speculator.trial) is not None:
        if trial.acceptance_length is not None:
            yield "candidate", trial.acceptance_length.candidate
        yield from _change("acceptance", trial.acceptance_length)
        yield from _change("latency", trial.inter_token_latency_s)


def _change(name: str, change: MetricChange | None) -> Iterator[tuple[str, float]]:
    if change is None:
        return
    yield f"{name} change", change.change_percent
    if change.low_percent is not None and change.high_percent is not None:
        yield from ((f"{name} low", change.low_percent), (f"{name} high", change.high_percent))


def _learning(speculator: Speculator) -> Iterator[tuple[str, float]]:
    if speculator.pace is not None:
        yield "trained tokens", speculator.pace.tokens_per_second
    if speculator.learning is not None:
        yield "stored", speculator.learning.samples


def _processes(installation: Installation) -> Iterator[tuple[str, float]]:
    """Yield the figures of the trainer and of the inference process; NaN and None are left out."""
    training, serving = installation.training, installation.serving
    figures: dict[str, float | None] = {}
    if training is not None:
        figures |= {"loss": training.loss, "demand": training.demand_tokens_per_s}
        lengths = {f"held-out {role}": length for role, length in training.acceptance_length.items()}
        figures |= {
            name: length or None for name, length in (*lengths.items(), ("trained on", training.trained_length))
        }
    if serving is not None:
        figures |= {"lookahead": serving.lookahead, "granted": serving.granted_tokens_per_s}
        figures |= {f"{DROPPED}{reason}": float(count) for reason, count in serving.capture_dropped.items()}
    yield from ((name, value) for name, value in figures.items() if value is not None and math.isfinite(value))

"""The numbers of one moment that the charts follow, by name."""

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
    if (training := installation.training) is not None:
        if training.loss is not None:
            yield "loss", training.loss
        for role, length in training.acceptance_length.items():
            if length:
                yield f"held-out {role}", length
        if training.trained_length:
            yield "trained on", training.trained_length
        if training.demand_tokens_per_s is not None:
            yield "demand", training.demand_tokens_per_s
    if (serving := installation.serving) is not None:
        if serving.lookahead is not None:
            yield "lookahead", serving.lookahead
        if serving.granted_tokens_per_s is not None:
            yield "granted", serving.granted_tokens_per_s
        for reason, count in serving.capture_dropped.items():
            yield f"{DROPPED}{reason}", float(count)

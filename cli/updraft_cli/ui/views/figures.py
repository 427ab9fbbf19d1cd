"""The numbers of one moment that the charts follow, by name."""

import math
from collections.abc import Iterator, Mapping

from updraft_cli.backends.installation import Installation
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import MetricChange, Speculator

DOMAIN = "domain "
"""Prefix of the names with the acceptance length of one domain."""
MEAN = "mean since the pods' start, "
"""Prefix of the names with the acceptance length where no registry can be read."""
DROPPED = "dropped "
"""Prefix of the names with the dropped traces for one reason, since the start of the pod."""


def counters(speculator: Speculator) -> dict[int, tuple[int, int]]:
    """Return tokens and verify steps by version; empty if only their ratio is known."""
    served = {one.version: one.acceptance for one in speculator.traffic}
    return {
        version: (acceptance.tokens, acceptance.verify_steps)
        for version, acceptance in served.items()
        if acceptance.tokens and acceptance.verify_steps
    }


def figures(one: SpeculatorSnapshot, installation: Installation, recent: Mapping[int, float]) -> dict[str, float]:
    """`recent` is the acceptance length of the last minute by version."""
    return dict(
        (
            *_acceptance(one.speculator, recent),
            *_rollout(one.speculator),
            *_learning(one.speculator),
            *(_processes(installation) if installation.processes is not None else ()),
        )
    )


def _acceptance(speculator: Speculator, recent: Mapping[int, float]) -> Iterator[tuple[str, float]]:
    """Yield that of the last minute. Without a registry, a cluster has the mean since its pods' start: another line."""
    if speculator.resource is None or speculator.traffic:
        roles = {"stable": speculator.stable, "candidate": speculator.candidate or -1}
        yield from ((role, recent[version]) for role, version in roles.items() if version in recent)
        return
    if speculator.acceptance is not None:
        yield f"{MEAN}version that serves", speculator.acceptance.length
    if speculator.trial is not None and speculator.trial.acceptance_length is not None:
        yield f"{MEAN}candidate", speculator.trial.acceptance_length.candidate


def _rollout(speculator: Speculator) -> Iterator[tuple[str, float]]:
    for domain in speculator.domains:
        if domain.stable is not None:
            yield f"{DOMAIN}{domain.domain}", domain.stable
    if (speedup := speculator.speedup) is not None:
        yield from (("speedup", speedup.ratio), ("speedup low", speedup.low), ("speedup high", speedup.high))
    if (trial := speculator.trial) is not None:
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
    if (done := speculator.learning) is not None:
        yield "stored", done.samples
        held_out = done.held_out_length
        figures = {
            "loss": done.loss,
            "demand": done.demand_tokens_per_s,
            "granted": done.granted_tokens_per_s,
            "lag": done.lag_s,
            "held-out candidate": held_out.candidate if held_out else None,
            "held-out baseline": held_out.stable if held_out else None,
            "trained on": done.trained_length,
        }
        yield from ((name, value) for name, value in figures.items() if value is not None)


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

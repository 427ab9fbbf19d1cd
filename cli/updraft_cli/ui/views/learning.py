"""Learning: what the trainer learns from, how well it does on held-out requests, and where its time goes."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from updraft_cli import output
from updraft_cli.backends.installation import Installation, Training
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import Pace, Speculator
from updraft_cli.ui.views import overview, parts
from updraft_cli.ui.views.parts import Cell, Fact, Figure, Notice, Share, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningPage:
    message: str
    figures: tuple[Figure, ...]
    facts: tuple[Fact, ...]
    shares: tuple[Share, ...]
    """Where the trainer spent the last minute."""
    domains: Table | None
    replay: Table | None
    notices: tuple[Notice, ...]
    is_silent: bool
    """No trainer reports."""


def learning(one: SpeculatorSnapshot, installation: Installation, now: datetime) -> LearningPage:
    speculator, training = one.speculator, installation.training
    return LearningPage(
        message=output.sentence(speculator.trainer_message or _adapting(speculator)),
        figures=tuple(_figures(speculator, training)),
        facts=(*_paced(speculator.pace, now), *(_trained(training) if training else ())),
        shares=parts.shares(speculator.pace.shares.items()) if speculator.pace else (),
        domains=_domains(speculator),
        replay=_replay(training) if training else None,
        notices=tuple(overview.notices(speculator)),
        is_silent=speculator.learning is None and speculator.pace is None and training is None,
    )


def _adapting(speculator: Speculator) -> str:
    adapting = speculator.resource.condition("Adapting") if speculator.resource else None
    return adapting.message if adapting else ""


def _figures(speculator: Speculator, training: Training | None) -> Iterator[Figure]:
    if (done := speculator.learning) is not None:
        yield Figure(title="requests to train on", value=f"{done.samples:,}", bounds=f"{done.held_out:,} held out")
        yield Figure(title="optimizer steps", value=f"{done.steps:,}", bounds=f"{done.estimates:,} estimates")
    if speculator.pace is not None:
        yield Figure(title="trained tokens", value=f"{speculator.pace.tokens_per_second:,.0f}", unit="per second")
    if training is not None and training.loss is not None:
        yield Figure(title="loss", value=f"{training.loss:.3f}")
    if training is not None and {"mean", "low", "high"} <= training.gain.keys():
        gain = {name: 100 * value for name, value in training.gain.items()}
        kind = "good" if gain["low"] > 0 else "bad" if gain["high"] < 0 else ""
        bounds = f"{gain['low']:+.1f} to {gain['high']:+.1f} %"
        yield Figure(
            title="gain at the last estimate", value=f"{gain['mean']:+.1f}", unit="%", bounds=bounds, kind=kind
        )


def _paced(pace: Pace | None, now: datetime) -> Iterator[Fact]:
    if pace is None:
        return
    if pace.device:
        ranks = f"{pace.ranks} ranks on {pace.device}" if pace.ranks > 1 else pace.device
        yield parts.fact("device", ranks)
    if pace.utilization is not None:
        yield parts.fact("utilization", f"{100 * pace.utilization:.0f} % of the device's peak")
    yield parts.fact("next estimate", _next_estimate(pace, now))
    yield Fact(name="state saved", value=parts.when(pace.last_save, now))


def _next_estimate(pace: Pace, now: datetime) -> str:
    if not pace.steps_to_estimate:
        return "due"
    steps = f"in {output.count(pace.steps_to_estimate, 'step')}"
    if pace.estimate_due is None:
        return steps
    seconds = (pace.estimate_due - now).total_seconds()
    return f"{steps}, or {f'in {output.span(seconds)}' if seconds >= 1 else 'as soon as anything has changed'}"


def _trained(training: Training) -> Iterator[Fact]:
    yield parts.fact("tokens trained on", f"{training.trained_tokens:,}")
    for role, length in training.acceptance_length.items():
        if length:
            yield parts.fact(f"held-out requests, {role}", f"{length:.2f} tokens per step")
    if training.trained_length:
        yield parts.fact("requests it was trained on", f"{training.trained_length:.2f} tokens per step")
    if training.demand_tokens_per_s is not None:
        yield parts.fact("demand", f"{training.demand_tokens_per_s:,.0f} captured tokens per second")
    if training.lag_s is not None:
        yield parts.fact("lag", f"the newest trace was stored {training.lag_s:.1f} s after it was sent")
    for outcome, count in training.published.items():
        yield parts.fact(f"candidates, {outcome}", f"{count:,}")


def _domains(speculator: Speculator) -> Table | None:
    if not speculator.domains:
        return None
    rows = [
        (Cell(text=one.domain), parts.number(one.stable), parts.number(one.candidate)) for one in speculator.domains
    ]
    return parts.table(("domain", ">stable", ">candidate"), rows, caption="Live acceptance length by domain")


def _replay(training: Training) -> Table:
    rows = [
        *((Cell(text=f"stored, {pool}"), parts.count(number)) for pool, number in training.replay.items()),
        *((Cell(text=f"admitted, {split}"), parts.count(number)) for split, number in training.samples.items()),
        *((Cell(text=f"refused, {reason}"), parts.count(number)) for reason, number in training.refused.items()),
    ]
    return parts.table(("requests", ">number"), rows, caption="Replay", empty="Nothing is stored yet.")

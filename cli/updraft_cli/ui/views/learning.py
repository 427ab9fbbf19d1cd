"""Learning: what the trainer learns from, how well it does on held-out requests, and where its time goes."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from updraft_cli import output
from updraft_cli.backends.installation import Installation, Training
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import Learning, Pace, Speculator
from updraft_cli.ui.views import overview, parts
from updraft_cli.ui.views.parts import Cell, Fact, Figure, Notice, Share, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningPage:
    message: str
    figures: tuple[Figure, ...]
    facts: tuple[Fact, ...]
    shares: tuple[Share, ...]
    """Where the trainer spent the last minute."""
    kinds: Table | None
    """Stored requests by kind of traffic and age, and what drafts are worth there."""
    shifts: Table | None
    replay: Table | None
    notices: tuple[Notice, ...]
    is_silent: bool
    """No trainer reports."""


def learning(one: SpeculatorSnapshot, installation: Installation, now: datetime) -> LearningPage:
    speculator, training = one.speculator, installation.training
    done = speculator.learning
    return LearningPage(
        message=output.sentence(speculator.trainer_message or _adapting(speculator)),
        figures=tuple(_figures(speculator)),
        facts=(
            *_paced(speculator.pace, now),
            *(_learned(done) if done else ()),
            *(_trained(training) if training else ()),
        ),
        shares=parts.shares(speculator.pace.shares.items()) if speculator.pace else (),
        kinds=_kinds(done, speculator.pace.ranks if speculator.pace else 1) if done and done.kinds else None,
        shifts=_shifts(done, now) if done and done.shifts else None,
        replay=_replay(training) if training else None,
        notices=tuple(overview.notices(one)),
        is_silent=done is None and speculator.pace is None and training is None,
    )


def _adapting(speculator: Speculator) -> str:
    adapting = speculator.resource.condition("Adapting") if speculator.resource else None
    return adapting.message if adapting else ""


def _figures(speculator: Speculator) -> Iterator[Figure]:
    if (done := speculator.learning) is not None:
        yield Figure(title="requests to train on", value=f"{done.samples:,}", bounds=f"{done.held_out:,} held out")
        yield Figure(title="optimizer steps", value=f"{done.steps:,}", bounds=f"{done.estimates:,} estimates")
    if speculator.pace is not None:
        yield Figure(title="trained tokens", value=f"{speculator.pace.tokens_per_second:,.0f}", unit="per second")
    if done is not None and done.loss is not None:
        yield Figure(title="loss", value=f"{done.loss:.3f}")
    if done is not None and (gain := done.held_out_length) is not None:
        kind = parts.change_kind(gain, is_up_good=True)
        known = gain.low_percent is not None and gain.high_percent is not None
        bounds = f"{gain.low_percent:+.1f} to {gain.high_percent:+.1f} %" if known else ""
        yield Figure(
            title="gain at the last estimate", value=f"{gain.change_percent:+.1f}", unit="%", bounds=bounds, kind=kind
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


def _learned(done: Learning) -> Iterator[Fact]:
    if (held_out := done.held_out_length) is not None:
        yield parts.fact(
            "draft in training, held-out requests of the last estimate", f"{held_out.candidate:.2f} tokens per step"
        )
        yield parts.fact(
            "draft that served, held-out requests of the last estimate", f"{held_out.stable:.2f} tokens per step"
        )
    if done.trained_length is not None:
        yield parts.fact("draft in training, requests that it learned", f"{done.trained_length:.2f} tokens per step")
    if done.demand_tokens_per_s is not None:
        yield parts.fact("demand", f"{done.demand_tokens_per_s:,.0f} captured tokens per second")
    if done.granted_tokens_per_s is not None:
        yield parts.fact("credits", f"{done.granted_tokens_per_s:,.0f} captured tokens per second granted to the pods")
    if done.lag_s is not None:
        yield parts.fact("lag", f"the newest request was stored {done.lag_s:.1f} s after it was sent")


def _trained(training: Training) -> Iterator[Fact]:
    yield parts.fact("tokens trained on", f"{training.trained_tokens:,}")
    for outcome, count in training.published.items():
        yield parts.fact(f"candidates, {outcome}", f"{count:,}")


def _kinds(done: Learning, ranks: int) -> Table:
    rows = [
        (
            Cell(text=kind.name),
            Cell(text=f"{100 * kind.recent_share:.0f} %", css="num"),
            parts.count(kind.samples),
            parts.count(kind.held_out),
            parts.count(kind.last_hour),
            parts.count(kind.last_day - kind.last_hour),
            parts.count(kind.samples + kind.held_out - kind.last_day),
            parts.number(kind.candidate_length),
            parts.number(kind.stable_length),
        )
        for kind in done.kinds
    ]
    columns = (
        *("domain", ">today's traffic", ">to train on", ">held out", ">within an hour", ">1 to 24 hours", ">older"),
        *(">tokens per step, in training", ">serving"),
    )
    where = " at rank 0" if ranks > 1 else ""
    caption = f"Stored requests{where} by domain and by age before the newest, and acceptance on the held-out ones"
    return parts.table(columns, rows, caption=caption)


def _shifts(done: Learning, now: datetime) -> Table:
    rows = [
        (parts.when(shift.time, now), Cell(text=shift.before), Cell(text=shift.after)) for shift in done.shifts[::-1]
    ]
    return parts.table(("time", "fewer", "more"), rows, caption="Shifts of the traffic")


def _replay(training: Training) -> Table:
    rows = [
        *((Cell(text=f"stored: {_POOLS.get(pool, pool)}"), parts.count(n)) for pool, n in training.replay.items()),
        *((Cell(text=f"came in: {_POOLS.get(split, split)}"), parts.count(n)) for split, n in training.samples.items()),
        *((Cell(text=f"refused: {parts.words(why)}"), parts.count(n)) for why, n in training.refused.items()),
    ]
    caption = "Replay: requests that are stored, and those since the trainer started"
    return parts.table(("requests", ">number"), rows, caption=caption, empty="Nothing is stored yet.")


_POOLS = {
    "window": "the newest, to train on",
    "reservoir": "a sample of older ones, to train on",
    "train": "to train on",
    "evaluation": "held out",
}

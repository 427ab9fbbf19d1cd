"""A speculator on a terminal: what serves, what is in canary, and how candidate and stable compare."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.drafts import Draft
from updraft_cli.backends.speculators import MetricChange, RolloutStatus, Speculator, Trial
from updraft_cli.cmd.draft.view import length, phase
from updraft_cli.cmd.follow import Item
from updraft_cli.cmd.policy import view as policies
from updraft_cli.output import ago, count
from updraft_rollouts.terms import OnInconclusive, Strategy

Fact = tuple[str, str | Text]

_MARKS = {"hold": "not yet known", "pass": "significantly better", "fail": "failed"}
_STYLES = {"pass": "green", "fail": "red"}


def rendered(status: RolloutStatus, now: datetime, *, is_wide: bool) -> RenderableType:
    """One sentence, then the comparison; wide, with the registry's evidence."""
    parts: list[RenderableType] = [Text(output.sentence(_headline(status)), "bold"), ""]
    if status.trial is not None:
        facts = [*_trial(status, status.trial, now), *held(status)]
        parts += [_comparison(status, status.trial), "", output.facts(facts)]
        if is_wide and status.trial.evidence:
            parts += ["", output.sentence(status.trial.evidence)]
    else:
        parts.append(output.facts(_rest(status, now)))
    return Group(*parts)


def items(status: RolloutStatus) -> Sequence[Item]:
    """During a canary the message counts seconds, which alone are no reason for a line."""
    trial, draft = status.trial, status.version
    key: object = (status.stable, status.candidate, status.pinned, status.paused)
    key = (key, draft and (draft.version, draft.phase))
    if trial is None:
        key = (key, status.message)
    else:
        pods = status.pods if trial.comparison == "pods" else None
        key = (key, pods, (trial.step, trial.verdict, trial.slices, trial.failures))
    return (Item(name=status.name, key=key, value=status, line=message(status)),)


def message(speculator: Speculator) -> str:
    return speculator.message or f"nothing is known about {speculator.name}"


def stable(speculator: Speculator) -> str:
    """Return what serves now."""
    if not speculator.stable:
        return "no draft"
    acceptance = f", {length(speculator.acceptance)} tokens per step" if speculator.acceptance else ""
    return f"version {speculator.stable}{acceptance}"


def pods(speculator: Speculator) -> str:
    """Return how many pods there are, and with which version."""
    counted, is_cluster = speculator.pods, speculator.pods.connected is None
    if not counted.num and not is_cluster:
        return "none is connected"
    texts = [f"{num_pods(speculator)} {'ready' if is_cluster else 'connected'}"]
    if speculator.stable and counted.serving_stable is not None:
        texts.append(f"{counted.serving_stable} with version {speculator.stable}")
    if counted.failed:
        texts.append(f"{counted.failed} {'with a problem' if is_cluster else 'unable to load their version'}")
    return ", ".join(texts)


def num_pods(speculator: Speculator) -> str:
    wanted = speculator.pods.wanted
    return str(speculator.pods.num) if wanted is None else f"{speculator.pods.num}/{wanted}"


def held(speculator: Speculator) -> Iterator[Fact]:
    """Yield what a person has set that holds new versions back."""
    if speculator.pinned is not None:
        version = f"version {speculator.pinned}" if speculator.pinned else "no draft"
        yield "pinned", Text(f"{version}{_because(speculator.pin_reason)}", "yellow")
    if speculator.paused:
        yield "paused", Text(f"yes{_because(speculator.pause_reason)}", "yellow")


def _headline(status: RolloutStatus) -> str:
    """Return the message without the numbers that the table below it has."""
    if status.trial is None or status.trial.acceptance_length is None or not status.trial.evidence:
        return message(status)
    return message(status).replace(status.trial.evidence, status.trial.evidence.partition(": ")[0])


def _comparison(status: Speculator, trial: Trial) -> Table:
    table = output.table("", "candidate", "stable", "change")
    table.add_row("version", str(trial.candidate), str(trial.baseline or "no draft"))
    if trial.comparison == "pods":
        table.add_row("pods", str(status.pods.serving_candidate), str(status.pods.serving_stable))
    table.add_row("tokens per step", *_cells(trial.acceptance_length, 1.0, is_up_good=True))
    if trial.baseline and (trial.comparison or trial.inter_token_latency_s):
        table.add_row("ms between tokens", *_cells(trial.inter_token_latency_s, 1000.0, is_up_good=False))
    return table


def _cells(change: MetricChange | None, factor: float, *, is_up_good: bool) -> tuple[str, str, str | Text]:
    if change is None:
        return "-", "-", Text("not enough data yet", "dim")
    numbers = [f"{factor * value:.3g}" if factor > 1 else f"{value:.2f}" for value in (change.candidate, change.stable)]
    return numbers[0], numbers[1], _change(change, is_up_good=is_up_good)


def _change(change: MetricChange, *, is_up_good: bool) -> Text:
    """Colour it only where the bounds leave no doubt about the direction."""
    percent = f"{change.change_percent:+.1f} %"
    if change.low_percent is None or change.high_percent is None:
        return Text(percent) + Text(" (no bounds yet)", "dim")
    is_up, is_down = change.low_percent > 0, change.high_percent < 0
    style = ("green" if is_up == is_up_good else "red") if is_up or is_down else ""
    return Text(percent, style) + Text(f" ({change.low_percent:+.1f} to {change.high_percent:+.1f} %)", "dim")


def _trial(status: Speculator, trial: Trial, now: datetime) -> Iterator[Fact]:
    """Yield what is known: a cluster knows the step, and the registry the rest."""
    policy = status.policy
    if trial.step is not None:
        yield "step", _step(status, trial, now)
    if trial.requests is not None:
        evidence = f"{count(trial.requests, 'request')} with the candidate, {count(trial.slices or 0, 'slice')}"
        yield "evidence", f"{evidence}, compared {f'by {trial.comparison}' if trial.baseline else 'with no draft'}"
    if trial.failures is not None:
        tolerated = policy.analysis.failure_limit if policy.analysis else None
        limit = "" if tolerated is None else f" ({tolerated} tolerated)"
        yield "failures", Text(f"{trial.failures}{limit}", "red" if trial.failures else "")
    if trial.verdict:
        dry = ", dry run" if policy.analysis and policy.analysis.dry_run else ""
        yield "verdict", Text(_MARKS.get(trial.verdict, "-"), _STYLES.get(trial.verdict, "")) + dry
    if policy.progress_deadline_seconds and trial.started is not None:
        yield "deadline", _deadline(status, trial, policy.progress_deadline_seconds, trial.started, now)


def _step(status: Speculator, trial: Trial, now: datetime) -> str:
    steps = status.policy.steps or ()
    step = steps[trial.step - 1] if trial.step and trial.step <= len(steps) else None
    percent = trial.pods_percent or (step.pods_percent if step else None)
    pods = f": {percent} % of the pods" if percent else ""
    held = f" for {output.span(step.hold_seconds)}" if step else ""
    since = f", since {output.span((now - trial.step_since).total_seconds())}" if trial.step_since else ""
    return f"{trial.step} of {trial.steps}{pods}{held}{since}"


def _deadline(status: Speculator, trial: Trial, within_s: int, started: datetime, now: datetime) -> str:
    """About when; only the message has it exactly, because this clock also stops while there are no pods."""
    analysis = status.policy.analysis
    if not trial.baseline and not (analysis and analysis.on_inconclusive is OnInconclusive.PROMOTE):
        return "none: a first version is not rolled back for a lack of traffic"
    left_s = within_s - (now - started).total_seconds() + trial.paused_s
    paused = " while not paused" if status.paused else ""
    left = f"{output.span(left_s)} of {output.span(within_s)} left{paused}"
    return f"{left}; then, without a verdict, {policies.at_deadline(status.policy)}"


def _rest(status: RolloutStatus, now: datetime) -> Iterator[Fact]:
    """Yield the facts while there is no canary."""
    yield "stable", stable(status)
    if status.version is not None and status.version.version != status.stable:
        yield "newest" if status.version.version == status.latest else "version", _fate(status.version, now)
    if status.previous and status.stable:
        yield "previous", f"version {status.previous}: the fallback after a failure"
    yield "pods", pods(status)
    strategy = status.policy.strategy
    steps = f": {policies.steps(status.policy)}" if strategy is Strategy.CANARY else ""
    yield "policy", f"{(strategy or '').lower()}{steps}"
    yield from held(status)


def _fate(draft: Draft, now: datetime) -> Text:
    when = f" {ago(draft.since, now)}" if draft.since else ""
    text = Text(f"version {draft.version}, ") + phase(draft.phase)
    return text + f"{when}: {draft.reason.removeprefix(f'{draft.phase}: ')}"


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""

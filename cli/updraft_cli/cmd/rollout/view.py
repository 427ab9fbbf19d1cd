"""A rollout on a terminal: one sentence, then candidate and stable beside each other."""

from collections.abc import Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.drafts import Draft
from updraft_cli.backends.policy import Step
from updraft_cli.backends.rollout import Estimate, Status, Trial
from updraft_cli.cmd.draft.view import length, phase
from updraft_cli.cmd.policy import view as policies
from updraft_cli.output import ago, count

_MARKS = {"hold": "not yet known", "pass": "surely better", "fail": "failed"}
_STYLES = {"pass": "green", "fail": "red"}


def rendered(status: Status, now: datetime, *, is_wide: bool) -> RenderableType:
    """All of it; wide, with what the registry says of the evidence."""
    parts: list[RenderableType] = [Text(output.sentence(_headline(status)), "bold"), ""]
    if status.trial is not None:
        parts += [_comparison(status, status.trial), "", output.facts(_trial(status, status.trial, now))]
        if is_wide and status.trial.evidence:
            parts += ["", output.sentence(status.trial.evidence)]
    else:
        parts.append(output.facts(_rest(status, now)))
    return Group(*parts)


def _headline(status: Status) -> str:
    """What the registry says, less the numbers that stand in the table below it."""
    message = status.message or f"nothing is known of {status.speculator}"
    if status.trial is None or status.trial.acceptance_length is None:
        return message
    return message.replace(status.trial.evidence, status.trial.evidence.partition(": ")[0])


def line(status: Status) -> str:
    """One line for a log: what the registry says."""
    return status.message or f"nothing is known of {status.speculator}"


def _comparison(status: Status, trial: Trial) -> Table:
    table = output.table("", "candidate", "stable", "change")
    table.add_row("version", str(trial.candidate), str(trial.baseline))
    if trial.comparison == "pods":
        table.add_row("pods", str(status.pods.serving_candidate), str(status.pods.serving_stable))
    table.add_row("tokens a step", *_cells(trial.acceptance_length, 1.0, is_up_good=True))
    table.add_row("ms between tokens", *_cells(trial.inter_token_latency_s, 1000.0, is_up_good=False))
    return table


def _cells(estimate: Estimate | None, factor: float, *, is_up_good: bool) -> tuple[str, str, str | Text]:
    if estimate is None:
        return "-", "-", Text("too little seen yet", "dim")
    numbers = [
        f"{factor * value:.3g}" if factor > 1 else f"{value:.2f}" for value in (estimate.candidate, estimate.stable)
    ]
    return numbers[0], numbers[1], _change(estimate, is_up_good=is_up_good)


def _change(estimate: Estimate, *, is_up_good: bool) -> Text:
    """The change with its bounds, coloured only where the bounds leave no doubt of the direction."""
    change = f"{estimate.change_percent:+.1f} %"
    if estimate.low_percent is None or estimate.high_percent is None:
        return Text(change) + Text(" (no bounds yet)", "dim")
    is_up, is_down = estimate.low_percent > 0, estimate.high_percent < 0
    style = ("green" if is_up == is_up_good else "red") if is_up or is_down else ""
    return Text(change, style) + Text(f" ({estimate.low_percent:+.1f} to {estimate.high_percent:+.1f} %)", "dim")


def _trial(status: Status, trial: Trial, now: datetime) -> Iterator[tuple[str, str | Text]]:
    policy = status.policy
    tolerated = policy.analysis.failure_limit if policy.analysis else None
    held = f" for {output.span(step.hold_seconds)}" if (step := _step(status, trial)) else ""
    since = output.span((now - trial.step_since).total_seconds())
    yield "step", f"{trial.step} of {trial.steps}: {trial.pods_percent} % of the pods{held}, since {since}"
    seen = f"{count(trial.requests, 'request')} of the candidate, {count(trial.slices, 'slice')}"
    yield "evidence", f"{seen}, compared by {trial.comparison}"
    limit = "" if tolerated is None else f" ({tolerated} tolerated)"
    yield "failures", Text(f"{trial.failures}{limit}", "red" if trial.failures else "")
    dry = ", dry run" if policy.analysis and policy.analysis.dry_run else ""
    yield (
        "verdict",
        Text(_MARKS.get(trial.verdict, "-"), _STYLES.get(trial.verdict, "")) + dry,
    )
    if policy.progress_deadline_seconds:
        yield "deadline", _deadline(status, trial, now)
    yield from _held(status)


def _step(status: Status, trial: Trial) -> Step | None:
    steps = status.policy.steps or ()
    return steps[trial.step - 1] if trial.step <= len(steps) else None


def _deadline(status: Status, trial: Trial, now: datetime) -> str:
    """About when; exactly, the message tells, for the registry also stops this clock while there are no pods."""
    within_s = status.policy.progress_deadline_seconds or 0
    left_s = within_s - (now - trial.started).total_seconds() + trial.paused_s
    paused = " while not paused" if status.paused else ""
    left = f"{output.span(left_s)} of {output.span(within_s)} left{paused}"
    return f"{left}; then, without a verdict, {policies.at_deadline(status.policy)}"


def _rest(status: Status, now: datetime) -> Iterator[tuple[str, str | Text]]:
    """What there is to say while nothing is tried."""
    if status.stable:
        steps = f", {length(status.acceptance)} tokens a step" if status.acceptance else ""
        yield "stable", f"version {status.stable}{steps}"
    else:
        yield "stable", "no draft"
    if status.version is not None and status.version.version != status.stable:
        yield "newest" if status.version.version == status.latest else "version", _fate(status.version, now)
    if status.previous and status.stable:
        yield "previous", f"version {status.previous}: a failure falls back to it"
    yield "pods", _pods(status)
    strategy = status.policy.strategy or ""
    yield "policy", f"{strategy}: {policies.steps(status.policy)}" if strategy == "canary" else strategy
    yield from _held(status)


def _fate(draft: Draft, now: datetime) -> Text:
    told = Text(f"version {draft.version}, ") + phase(draft.phase)
    return told + f" {ago(draft.since, now)}: {draft.reason.removeprefix(f'{draft.phase}: ')}"


def _pods(status: Status) -> str:
    pods = status.pods
    if not pods.connected:
        return "none is connected"
    serving = f", {pods.serving_stable} with the stable version" if status.stable else ""
    failed = f", {pods.failed} could not load what they should" if pods.failed else ""
    return f"{pods.connected} connected{serving}{failed}"


def _held(status: Status) -> Iterator[tuple[str, str | Text]]:
    if status.pinned is not None:
        what = f"version {status.pinned}" if status.pinned else "no draft"
        yield "pinned", Text(f"{what}{_why(status.pin_reason)}", "yellow")
    if status.paused:
        yield "paused", Text(f"yes{_why(status.pause_reason)}", "yellow")


def _why(reason: str) -> str:
    return f": {reason}" if reason else ""

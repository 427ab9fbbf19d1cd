"""`rollout policy`: how new versions come to serve; shown, and set from a file, by flags, or both."""

from functools import partial
from typing import IO, Any

import click

from updraft_cli import output
from updraft_cli.backends.policy import Policy, read
from updraft_cli.backends.protocol import Backend
from updraft_cli.cmd import arguments, options
from updraft_cli.cmd.decisions import warn
from updraft_cli.cmd.policy import view
from updraft_cli.cmd.policy.durations import DURATION
from updraft_cli.cmd.program import Group
from updraft_cli.output import Format
from updraft_rollouts.terms import Comparison, OnInconclusive, Strategy, Term


class StepType(click.ParamType[dict[str, int]]):
    """Converts `10:2m` to a step."""

    name = "percent:hold"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        percent, colon, hold = str(value).partition(":")
        percent = percent.removesuffix("%")
        if not colon or not percent.isdecimal():
            self.fail(f"{value!r} is not a step; 10:2m means 10 % of the pods for 2 minutes", param, ctx)
        return {"pods_percent": int(percent), "hold_seconds": DURATION.convert(hold, param, ctx)}


class PolicyGroup(Group):
    """A group that shows the policy when no command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names_none = not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names)
        is_run = not ctx.resilient_parsing  # a shell that completes wants the commands
        return super().parse_args(ctx, ["show", *args] if names_none and is_run else args)


def _words(kind: type[Term]) -> click.Choice[str]:
    return click.Choice([term.lower() for term in kind])


_PERCENT = click.IntRange(0, 100)
_COUNT = click.IntRange(1)
_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)

# By the path in the policy.
FLAGS: dict[str, tuple[str, Any, str]] = {
    "strategy": (
        "--strategy",
        _words(Strategy),
        "Try a version on some pods first, serve it at once, or wait for `updraft draft promote`.",
    ),
    "analysis.interval_seconds": ("--interval", DURATION, "Minimum length of one observation, e.g. 30s."),
    "analysis.min_samples": ("--min-samples", _COUNT, "Requests that a candidate must serve before it can win."),
    "analysis.failure_limit": ("--failure-limit", click.IntRange(0), "Tolerated errors and crashes of the candidate."),
    "analysis.max_acceptance_regression_percent": (
        "--max-acceptance-regression",
        _PERCENT,
        "Percent; roll back once acceptance length is significantly lower by more than this.",
    ),
    "analysis.max_latency_regression_percent": (
        "--max-latency-regression",
        _PERCENT,
        "Percent; roll back once inter-token latency is significantly higher by more than this.",
    ),
    "analysis.on_inconclusive": (
        "--on-inconclusive",
        _words(OnInconclusive),
        "Action at the deadline for a canary without a verdict.",
    ),
    "analysis.dry_run": (
        "--analysis-dry-run/--no-analysis-dry-run",
        bool,
        "Measure and report only: the steps always end in a promotion.",
    ),
    "analysis.confidence": (
        "--confidence",
        _SHARE,
        "Confidence level, e.g. 0.95; 1 minus it bounds the rate of false promotions.",
    ),
    "analysis.comparison": (
        "--comparison",
        _words(Comparison),
        "pods: some pods against the others; switchback: each pod alternates; auto: switchback up to two pods.",
    ),
    "analysis.switchback_seconds": ("--switchback", DURATION, "Length of a switchback turn, e.g. 20s."),
    "auto_rollback": (
        "--auto-rollback/--no-auto-rollback",
        bool,
        "Roll back a canary that failed, or leave it for a person.",
    ),
    "progress_deadline_seconds": ("--deadline", DURATION, "Maximum length of a canary, without pauses, e.g. 15m."),
    "max_pods_swapping": ("--max-pods-swapping", click.IntRange(0), "Pods that may swap at the same time; 0: all."),
    "revision_history_limit": (
        "--history-limit",
        _COUNT,
        "Versions whose weights are kept, in addition to those in use.",
    ),
    "revision_history_megabytes": (
        "--history-megabytes",
        click.IntRange(0),
        "Maximum size of all kept weights in MB; versions in use stay beyond it too. 0: no limit.",
    ),
    "offline_gate.min_samples": (
        "--gate-min-samples",
        click.IntRange(2),
        "Minimum held-out requests of an evaluation.",
    ),
    "offline_gate.min_gain_percent": (
        "--gate-min-gain",
        float,
        "Percent; minimum gain in acceptance length at the offline gate.",
    ),
    "offline_gate.confidence": ("--gate-confidence", _SHARE, "Confidence of that gain, two-sided."),
}


def _flags(command: options.Decorated) -> options.Decorated:
    """Add a flag for each value; the command gets None for those that were not given."""
    for path, (name, kind, meaning) in reversed(FLAGS.items()):
        command = click.option(name, _parameter(path), type=kind, default=None, help=meaning)(command)
    return command


def _parameter(path: str) -> str:
    return path.replace(".", "_")


@click.group(cls=PolicyGroup)
def policy() -> None:
    """The rollout policy: how new versions come to serve. Without a command, show it."""


@policy.command(needs=("connection",))
@arguments.speculator
@options.output()
def show(backend: Backend, form: Format) -> None:
    """Show the policy in force. `-o yaml` is a file for `rollout policy set --file`; name is the strategy alone."""
    policy_ = backend.policy()
    names = [policy_.strategy.lower() if policy_.strategy else None]
    output.show(policy_, form, names=names, rendered=partial(view.rendered, policy_))


@policy.command("set", needs=("change", "connection"))
@arguments.speculator
@click.option("-f", "--file", type=click.File(), metavar="FILE", help="The whole policy, in YAML or JSON; - is stdin.")
@click.option("--default", "is_reset", is_flag=True, help="Reset to the default policy.")
@click.option(
    "--step",
    "steps",
    type=StepType(),
    multiple=True,
    help="Percent of the pods, and minimum time: --step 10:2m --step 50:2m. Replaces all existing steps.",
)
@_flags
def set_(
    *, backend: Backend, file: IO[str] | None, is_reset: bool, steps: tuple[dict[str, int], ...], **flags: Any
) -> None:
    """Change the policy, and print the changes.

    A file is the whole policy: fields that it leaves out get their defaults. Without a file, flags change the policy in
    force. With both, the file applies first.
    """
    changes = {path: value for path in FLAGS if (value := flags.get(_parameter(path))) is not None}
    if steps:
        changes["steps"] = list(steps)
    if file is not None and is_reset:
        raise click.UsageError("--file and --default are both a whole policy; name one of them")
    if file is None and not is_reset and not changes:
        raise click.UsageError("nothing to set: name a --file or a flag")
    whole = read(file.read(), file.name) if file else Policy() if is_reset else None
    result = backend.set_policy(whole, changes)
    warn(result.warning)
    for path, old, new in result.after.changes(result.before):
        click.echo(f"{path}: {_formatted(old)} -> {_formatted(new)}")
    if result.before == result.after:
        click.echo(f"The policy of {result.speculator} is unchanged.")
    click.echo(output.sentence(result.message))


def _formatted(value: Any) -> str:
    """A value in one line; a list of steps as one types it."""
    if isinstance(value, list):
        return " ".join(f"{step['pods_percent']}:{step['hold_seconds']}s" for step in value) or "none"
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""`updraft rollout policy`: how new versions come to serve; seen, and set from a file, by flags, or both."""

import asyncio
from functools import partial
from typing import IO, Any

import click

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli import output
from updraft_cli.backends import registry
from updraft_cli.backends.policy import Policy, read
from updraft_cli.backends.registry import TIMEOUT_S, Target
from updraft_cli.cmd import options
from updraft_cli.cmd.durations import DURATION
from updraft_cli.cmd.policy import view
from updraft_cli.output import Format


class StepType(click.ParamType[dict[str, int]]):
    """Converts `10:2m` to a step."""

    name = "percent:hold"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        """Check what was typed."""
        percent, colon, hold = str(value).partition(":")
        percent = percent.removesuffix("%")
        if not colon or not percent.isdecimal():
            self.fail(f"{value!r} is no step; 10:2m is 10 % of the pods for 2 minutes", param, ctx)
        return {"pods_percent": int(percent), "hold_seconds": DURATION.convert(hold, param, ctx)}


class PolicyGroup(options.Group):
    """A group that shows the policy when no command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `show` before its options."""
        names_none = not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names)
        is_run = not ctx.resilient_parsing  # a shell that completes wants the commands
        return super().parse_args(ctx, ["show", *args] if names_none and is_run else args)


_PERCENT = click.IntRange(0, 100)
_COUNT = click.IntRange(1)
_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)

# By the path in the policy.
FLAGS: dict[str, tuple[str, Any, str]] = {
    "strategy": (
        "--strategy",
        click.Choice(["canary", "immediate", "manual"]),
        "Try a version on some pods first, serve it at once, or wait for `updraft draft promote`.",
    ),
    "analysis.interval_seconds": ("--interval", DURATION, "Least length of one observation, e.g. 30s."),
    "analysis.min_samples": ("--min-samples", _COUNT, "Requests that a candidate must have served to win."),
    "analysis.failure_limit": (
        "--failure-limit",
        click.IntRange(0),
        "Errors and crashes with the candidate that are tolerated.",
    ),
    "analysis.max_acceptance_regression_percent": (
        "--max-acceptance-regression",
        _PERCENT,
        "Percent; rolled back once acceptance length is surely down by more.",
    ),
    "analysis.max_latency_regression_percent": (
        "--max-latency-regression",
        _PERCENT,
        "Percent; rolled back once inter-token latency is surely up by more.",
    ),
    "analysis.on_inconclusive": (
        "--on-inconclusive",
        click.Choice(["pause", "rollback", "promote"]),
        "What a canary without a verdict comes to at the deadline.",
    ),
    "analysis.dry_run": (
        "--analysis-dry-run/--no-analysis-dry-run",
        bool,
        "Measure and tell, and decide nothing by it: the steps end in a promotion.",
    ),
    "analysis.confidence": ("--confidence", _SHARE, "1 - this bounds the rate of false promotions, e.g. 0.95."),
    "analysis.comparison": (
        "--comparison",
        click.Choice(["auto", "pods", "switchback"]),
        "Some pods against others, or each pod against itself in turns; auto: turns up to two pods.",
    ),
    "analysis.switchback_seconds": ("--switchback", DURATION, "Length of such a turn, e.g. 20s."),
    "auto_rollback": (
        "--auto-rollback/--no-auto-rollback",
        bool,
        "Roll back what failed, or leave it where it is for a person.",
    ),
    "progress_deadline_seconds": ("--deadline", DURATION, "Of a canary as a whole, pauses apart, e.g. 15m."),
    "max_pods_swapping": ("--max-pods-swapping", click.IntRange(0), "Pods that may swap at once; 0: all."),
    "revision_history_limit": ("--history-limit", _COUNT, "Versions whose weights are kept besides those in use."),
    "offline_gate.min_samples": ("--gate-min-samples", click.IntRange(2), "Held-out requests of an evaluation."),
    "offline_gate.min_gain_percent": (
        "--gate-min-gain",
        float,
        "Percent; gain in acceptance length that the offline gate wants to be sure of.",
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
    """How new versions come to serve. Without a command it is shown."""


@policy.command()
@options.output()
@options.target
def show(target: Target, form: Format) -> None:
    """The policy in force; `-o yaml` is a file for `updraft rollout policy set --file`. name is the strategy alone."""
    found = asyncio.run(_policy(target))
    output.show(found, form, names=[found.strategy], rendered=partial(view.rendered, found))


@policy.command("set")
@click.option("-f", "--file", type=click.File(), metavar="FILE", help="The whole policy, in YAML or JSON; - is stdin.")
@click.option("--default", "is_reset", is_flag=True, help="The registry's own policy.")
@click.option(
    "--step",
    "steps",
    type=StepType(),
    multiple=True,
    help="Percent of the pods, and how long at least: --step 10:2m --step 50:2m. All given ones replace all there are.",
)
@_flags
@options.target
def set_(target: Target, file: IO[str] | None, is_reset: bool, steps: tuple[dict[str, int], ...], **flags: Any) -> None:  # noqa: FBT001 - a flag
    """Change the policy, and print what changed.

    A file is the whole policy: what it leaves out is the registry's own default. Without one, flags change the policy
    in force. Both together: the file first.
    """
    changes = {path: flags[_parameter(path)] for path in FLAGS if flags[_parameter(path)] is not None}
    if steps:
        changes["steps"] = list(steps)
    if file is not None and is_reset:
        raise click.UsageError("--file and --default both are the whole policy")
    if file is None and not is_reset and not changes:
        raise click.UsageError("nothing to set: name a --file or a flag")
    whole = read(file.read(), file.name) if file else Policy() if is_reset else None
    before, after, message = asyncio.run(_set(target, whole, changes))
    for path, old, new in after.changes(before):
        click.echo(f"{path}: {_told(old)} -> {_told(new)}")
    if before == after:
        click.echo(f"The policy of {target.speculator} was like this already.")
    click.echo(output.sentence(message))


async def _policy(target: Target) -> Policy:
    async with target.connected() as stub:
        state, _ = await registry.newest(stub, target.speculator)
    return Policy.from_proto(state.policy)


async def _set(target: Target, whole: Policy | None, changes: dict[str, Any]) -> tuple[Policy, Policy, str]:
    """Set it; return the policy in force before and after, and what follows."""
    async with target.connected() as stub:
        state, _ = await registry.newest(stub, target.speculator)
        before = Policy.from_proto(state.policy)
        wished = (whole or before).with_changes(changes)
        request = pb.SetPolicyRequest(speculator=target.speculator, policy=wished.to_proto())
        state = (await stub.SetPolicy(request, timeout=TIMEOUT_S)).state
    return before, Policy.from_proto(state.policy), state.message


def _told(value: Any) -> str:
    """A value in a line; a list of steps as one would type it."""
    if isinstance(value, list):
        return " ".join(f"{step['pods_percent']}:{step['hold_seconds']}s" for step in value) or "none"
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

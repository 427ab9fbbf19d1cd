"""`updraft rollout status | watch | pause | resume`."""

import asyncio
import sys
from datetime import UTC, datetime
from functools import partial

import click

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli import output
from updraft_cli.backends import rollout
from updraft_cli.backends.registry import TIMEOUT_S, Target, resolve
from updraft_cli.backends.rollout import Outcome, Status
from updraft_cli.cmd import options
from updraft_cli.cmd.draft.decisions import decide
from updraft_cli.cmd.durations import DURATION
from updraft_cli.cmd.policy.commands import policy
from updraft_cli.cmd.rollout import view
from updraft_cli.cmd.rollout.displays import Lines, Screen
from updraft_cli.cmd.rollout.follow import Display, follow
from updraft_cli.cmd.versions import VERSION
from updraft_cli.output import Format

_INTERRUPTED = 130
"""What a shell says of a process that SIGINT ended."""


@click.group("rollout", cls=options.Group)
def group() -> None:
    """How a new version comes to serve: see it, hold it, rule it.

    \b
    updraft rollout status       what is tried, how it does, what it waits for
    updraft rollout watch        the same, live, until it is over
    """


group.add_command(policy)


@group.command()
@click.argument("version", type=VERSION, required=False)
@click.option("--exit-code", is_flag=True, help="Tell the outcome by the exit code, see above.")
@options.output()
@options.target
def status(target: Target, version: int | str | None, form: Format, exit_code: bool) -> None:  # noqa: FBT001 - a flag
    """What is tried against what, how it does, and what it waits for.

    About VERSION; without one, about the version that is tried now, else the newest.

    \b
    With --exit-code:
      0  the version was promoted and all pods serve it, or there is none
      3  it lost: rejected, rolled back, failed, or superseded before it won
      4  it is under way: tried, waiting, held, or not on all pods yet
      1  the registry could not be asked
    """
    found = asyncio.run(_look(target, version))
    names = [found.version.version] if found.version else []
    output.show(found, form, names=names, rendered=partial(view.rendered, found, datetime.now(UTC)))
    if exit_code:
        raise SystemExit(found.outcome.exit_code)


@group.command()
@click.argument("version", type=VERSION, required=False)
@click.option("--follow", "is_endless", is_flag=True, help="Go on with the versions after it, until Ctrl-C.")
@click.option("--timeout", type=DURATION, help="Give up after this long, e.g. 90s, 15m, 1h.  [default: never]")
@options.output("table", "wide", "json")
@options.target
def watch(target: Target, version: int | str | None, is_endless: bool, timeout: int | None, form: Format) -> None:  # noqa: FBT001 - a flag
    """Follow a rollout live until it is over.

    Of VERSION; without one, of the version that is tried now, else the newest. On a terminal the picture is redrawn in
    place; into a pipe goes one line a change (-o json: one object a line). A registry that is away is waited for.

    \b
    Exit codes:
      0  the version was promoted and all pods serve it, or there is none
      3  it lost: rejected, rolled back, failed, or superseded before it won
      4  it was not over within --timeout
      1  the registry could not be asked            130  Ctrl-C
    """
    try:
        outcome = _watch(target, version, form, is_endless=is_endless, timeout_s=timeout)
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    raise SystemExit(outcome.exit_code)


@group.command()
@options.reason
@options.target
def pause(target: Target, reason: str) -> None:
    """Freeze: a canary stays where it is, and no new version is tried. A canary that fails is still rolled back."""
    request = pb.PauseRequest(speculator=target.speculator, reason=reason)
    decide(target, "The rollout is paused", lambda stub: stub.Pause(request, timeout=TIMEOUT_S))


@group.command()
@options.reason
@options.target
def resume(target: Target, reason: str) -> None:
    """Go on where it was paused."""
    request = pb.ResumeRequest(speculator=target.speculator, reason=reason)
    decide(target, "The rollout goes on", lambda stub: stub.Resume(request, timeout=TIMEOUT_S))


async def _look(target: Target, version: int | str | None) -> Status:
    async with target.connected() as stub:
        number = 0 if version is None else await resolve(stub, target.speculator, version)
        return await rollout.look(stub, target.speculator, number)


def _watch(
    target: Target, version: int | str | None, form: Format, *, is_endless: bool, timeout_s: int | None
) -> Outcome:
    def now() -> datetime:
        return datetime.now(UTC)

    followed = partial(_follow, target, version, is_endless=is_endless, timeout_s=timeout_s)
    if form == "json":
        written = partial(output.as_json, indent=None)
        return asyncio.run(followed(Lines(output.console(), now, written)))
    if not sys.stdout.isatty():
        return asyncio.run(followed(Lines(output.console(), now)))
    with Screen(output.console(), now, is_wide=form == "wide") as screen:
        return asyncio.run(followed(screen))


async def _follow(
    target: Target, version: int | str | None, display: Display, *, is_endless: bool, timeout_s: int | None
) -> Outcome:
    number = 0
    if version is not None:
        async with target.connected() as stub:
            number = await resolve(stub, target.speculator, version)
    try:
        async with asyncio.timeout(timeout_s):
            return await follow(target, display, number=number, is_endless=is_endless)
    except TimeoutError:
        click.echo(f"Not over within {output.span(timeout_s or 0)}.", err=True)
        return Outcome.UNDER_WAY

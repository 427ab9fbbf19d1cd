"""`rollout status | watch | pause | resume | policy`."""

import time
from datetime import UTC, datetime
from functools import partial

import click

from updraft_cli import output
from updraft_cli.backends.protocol import Backend, Version
from updraft_cli.backends.speculators import Outcome
from updraft_cli.cmd import arguments, decisions, options
from updraft_cli.cmd.follow import View, follow
from updraft_cli.cmd.policy.commands import policy
from updraft_cli.cmd.policy.durations import DURATION
from updraft_cli.cmd.program import Command, Group
from updraft_cli.cmd.rollout import view
from updraft_cli.output import Format

_command = partial(click.command, cls=Command, needs=("connection",))


@click.group(cls=Group)
def rollout() -> None:
    """Rollouts: how a new version comes to serve.

    \b
    rollout status       the canary, its measurements, and what it waits for
    rollout watch        the same, live, until it is over
    """


@_command()
@arguments.version(is_required=False)
@click.option("--exit-code", is_flag=True, help="Report the outcome as the exit code, see above.")
@options.output()
def status(backend: Backend, version: Version | None, form: Format, exit_code: bool) -> None:  # noqa: FBT001 - a flag
    """Show candidate against stable, the measurements, and what the rollout waits for.

    VERSION defaults to the canary, else to the newest version.

    \b
    With --exit-code:
      0  the version was promoted and all pods serve it, or there is none
      3  it lost: rejected, rolled back, failed, or superseded before it won
      4  it is under way: in canary, waiting, held, or not on all pods yet
      1  the state could not be read
    """
    state = backend.rollout(version)
    names = [state.version.version] if state.version else []
    output.show(state, form, names=names, rendered=partial(view.rendered, state, datetime.now(UTC)))
    if exit_code:
        raise SystemExit(state.outcome.exit_code)


@_command()
@arguments.version(is_required=False)
@click.option("--follow", "is_endless", is_flag=True, help="Continue with the versions after it, until Ctrl-C.")
@click.option("--timeout", type=DURATION, help="Give up after this long, e.g. 90s, 15m, 1h.  [default: never]")
@options.output("table", "wide", "json")
def watch(backend: Backend, version: Version | None, is_endless: bool, timeout: int | None, form: Format) -> None:  # noqa: FBT001 - a flag
    """Follow a rollout live until it is over.

    VERSION defaults to the canary, else to the newest version. On a terminal the picture is redrawn in place. In a pipe,
    each change is one line (-o json: one object per line). Outages are waited for.

    \b
    Exit codes:
      0  the version was promoted and all pods serve it, or there is none
      3  it lost: rejected, rolled back, failed, or superseded before it won
      4  it was not over within --timeout
      1  the state could not be read                130  Ctrl-C
    """
    deadline_s = None if timeout is None else time.monotonic() + timeout
    states = backend.watch_rollout(version, is_endless=is_endless, deadline_s=deadline_s)
    shown = View(items=view.items, rendered=view.rendered)
    try:
        last = follow(
            states, shown, form, is_last=lambda state: not is_endless and state.outcome is not Outcome.UNDER_WAY
        )
    except TimeoutError:
        click.echo(f"Not over within {output.span(timeout or 0)}.", err=True)
        raise SystemExit(Outcome.UNDER_WAY.exit_code) from None
    raise SystemExit(last.outcome.exit_code)


for command in (status, watch, decisions.pause, decisions.resume, policy):
    rollout.add_command(command)

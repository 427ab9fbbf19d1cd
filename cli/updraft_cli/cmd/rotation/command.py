"""`kubectl updraft rotate`: new passwords for the Redis users of a speculator, with an overlap."""

import time
from contextlib import closing
from datetime import UTC, datetime

import click

from updraft_chassis.errors import Unavailable
from updraft_cli import output
from updraft_cli.backends import objects
from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.cmd import arguments
from updraft_cli.cmd.follow import INTERRUPTED
from updraft_cli.cmd.policy.durations import DURATION
from updraft_cli.cmd.program import Command
from updraft_cli.cmd.rotation.state import ROTATE, Rotation, rotation_of

_LATE = 4
"""Exit code of a request that was not done in time, as of a rollout that is under way."""


@click.command(cls=Command, needs=("decision", "connection"))
@arguments.speculator
@click.option("--wait/--no-wait", "waits", default=True, help="Wait until it is done, and print each step.")
@click.option("--timeout", type=DURATION, help="Give up after this long, e.g. 90s, 15m, 1h.  [default: never]")
def rotate(backend: ClusterBackend, waits: bool, timeout: int | None) -> None:  # noqa: FBT001 - a flag
    """Replace the passwords with which pods and trainer reach Redis.

    The former passwords stay valid until all pods have restarted with the new ones, so nothing fails and no trace is lost.
    The request is an annotation of the resource. The operator completes it, also without this command, and its condition
    PasswordsRotated says how far it is. Calls of registries need no rotation: their tokens live for an hour.

    \b
    Exit codes:
      0  done, or asked for with --no-wait
      4  it was not done within --timeout; the operator continues
      1  failed                130  Ctrl-C; the operator continues
    """
    request = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    namespace, name = objects.key(backend.annotate({ROTATE: request}))
    if backend.is_dry_run:
        click.echo(f"Dry run, nothing was kept: {namespace}/{name} can be asked for new passwords.")
        return
    click.echo(f"Asked for new passwords of {namespace}/{name}.")
    if waits:
        _wait(backend, timeout)


def _wait(backend: ClusterBackend, timeout: int | None) -> None:
    deadline_s = None if timeout is None else time.monotonic() + timeout
    last = ""
    try:
        with closing(backend.watch_content(deadline_s=deadline_s)) as contents:
            for content in contents:
                state = content if isinstance(content, Unavailable) else rotation_of(content)
                if (line := _line(state)) != last:
                    click.echo(line)
                    last = line
                if isinstance(state, Rotation) and state.is_done:
                    return
    except TimeoutError:
        click.echo(f"Not done within {output.span(timeout or 0)}; the operator continues.", err=True)
        raise SystemExit(_LATE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _line(state: Rotation | Unavailable) -> str:
    if isinstance(state, Unavailable):
        return f"The API server does not answer: {state}"
    return f"Done: {state.message}." if state.is_done else f"Waiting: {state.message}."

"""`ui`: the console in the browser, until Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import click

from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.backends.forwarded.backend import forwarded
from updraft_cli.backends.protocol import ConsoleBackend
from updraft_cli.cmd import arguments
from updraft_cli.cmd.program import Command


@click.command(cls=Command, needs=("console", "connection"))
@arguments.speculator
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1.  [default: a free one]")
@click.option("--no-browser", is_flag=True, help="Print the address, and open no browser.")
def ui(backend: ConsoleBackend, port: int, no_browser: bool) -> None:  # noqa: FBT001 - a flag
    """Open the console: drafts, rollouts, learning and the fleet as pages that follow what happens.

    Without NAME, all speculators. It serves on 127.0.0.1 of this machine, with your rights, until Ctrl-C. The address holds a
    token; whoever has the address can use the console. Decisions are those of `draft pin`, `draft promote` and `rollout
    pause`, each after a page that says what will happen.
    """
    # Its libraries take a fifth of a second to import, which no other command should pay for.
    from updraft_cli.ui.browser import opened  # noqa: PLC0415
    from updraft_cli.ui.server import has_scripts, serving  # noqa: PLC0415

    with (
        _ended_as_by_ctrl_c(),
        _whole(backend) as whole,
        serving(whole, port=port) as console,
        suppress(KeyboardInterrupt),
    ):
        click.echo(console.address)
        click.echo("The console runs until Ctrl-C.", err=True)
        if not has_scripts():
            click.echo(
                "It was built without npm: pages do not update by themselves, and have tables for charts.", err=True
            )
        with nullcontext() if no_browser else opened(console.address):
            threading.Event().wait()


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """End by SIGTERM, and with the terminal, as by Ctrl-C: else tokens for registries would stay in their files."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # nohup ignores the end of the terminal
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _whole(backend: ConsoleBackend) -> AbstractContextManager[ConsoleBackend]:
    """Return the backend with the registries that belong to it."""
    return forwarded(backend) if isinstance(backend, ClusterBackend) else nullcontext(backend)

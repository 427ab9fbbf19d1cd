"""A running stack on a terminal: starts, readiness, and log lines without what the prefix already shows.

The log files have everything. Lines of Redis are shown only there.
"""

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import assert_never

from rich.console import Console
from rich.text import Text

from updraft_cli.local.folders import data_folder
from updraft_cli.local.process import Changed, Event, Line, State
from updraft_cli.local.stack import Stack

_COLOURS = {"redis": "magenta", "registry": "blue", "trainer": "green", "inference": "cyan"}
_LEVELS = {"DEBUG": "dim", "INFO": "", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}
_QUIET = frozenset({"redis"})
_NAME_WIDTH = max(map(len, _COLOURS))

_LOG_LINE = re.compile(r"(\d\d:\d\d:\d\d) ([A-Z]+) +[\w-]+: (.*)")
"""The format of chassis.logs.TextFormatter: time, level, process, message."""


class Terminal:
    def __init__(self, console: Console) -> None:
        self._console = console

    def listen(self, event: Event) -> None:
        """Print an event, as the listener of a stack."""
        match event:
            case Line():
                text = _line(event)
            case Changed():
                text = _change(event)
            case _:
                assert_never(event)
        if text is not None:
            self._print(_prefix(event.process.name) + text)

    def welcome(self, stack: Stack) -> None:
        """Print how to use a stack that is ready."""
        url = stack.addresses.inference_url
        model = stack.config.model_name or stack.config.model.name
        data = data_option(stack.folder.path)
        request = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Count to ten."}}]}}'
        self._print(
            Text.assemble(
                ("Ready. ", "bold"),
                "Send it a request:\n"
                f"  curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'\n"
                f"Look at it from another terminal:\n  updraft status{data}\n  updraft draft list{data}\n"
                f"Data and logs are in {stack.folder.path}.\n"
                "Ctrl-C stops everything; the next start continues from here.",
            )
        )

    def point_to_console(self, data: Path, address: str) -> None:
        """Print where the console is; its address is a password, which no log should hold."""
        where = address if self._console.is_terminal else f"run `updraft ui{data_option(data)}`"
        self._print(Text.assemble(("The console: ", "bold"), where))

    def print(self, sentence: str) -> None:
        self._print(Text(sentence, "bold"))

    def _print(self, text: Text) -> None:
        # A closed terminal or pipe must not end the children; rich exits on a broken pipe.
        with suppress(OSError, SystemExit):
            self._console.print(text, soft_wrap=True, highlight=False)


def data_option(data: Path) -> str:
    """Return the option with which other commands find a data folder; empty for the default one."""
    return "" if data == data_folder(os.environ) else f" --data {shlex.quote(str(data))}"


def _prefix(name: str) -> Text:
    return Text(f"{name:<{_NAME_WIDTH}} | ", _COLOURS.get(name, ""))


def _line(line: Line) -> Text | None:
    if line.process.name in _QUIET or not line.text:
        return None
    log = _LOG_LINE.fullmatch(line.text)
    if log is None:
        return Text(line.text, "dim")
    time, level, message = log.groups()
    shown = message if level == "INFO" else f"{level}: {message}"
    return Text(f"{time} ", "dim") + Text(shown, _LEVELS.get(level, ""))


def _change(change: Changed) -> Text | None:
    match change.state:
        case State.STARTING:
            return Text("starting")
        case State.READY:
            address = f" at {change.process.address}" if change.process.address else ""
            return Text(f"ready in {change.after_s:.1f} s{address}", "bold")
        case State.RESTARTING:
            return Text(f"{change.reason}; restarting in {change.after_s:.1f} s", "bold yellow")
        case State.FAILED:
            return Text(change.reason, "bold red")
        case State.STOPPING:
            return Text(f"stopping (at most {change.process.stop_within_s:.0f} s)")
        case State.STOPPED:
            return Text("stopped")
        case _:
            assert_never(change.state)

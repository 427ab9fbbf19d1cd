"""A rollout while it goes on: redrawn in place on a terminal, one line a change into a pipe."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.rollout import Status
from updraft_cli.cmd.rollout import view

Now = Callable[[], datetime]

_REFRESHES_PER_S = 2


class Lines:
    """Writes a line when something changed that is worth one: not for every count, and not for every second."""

    def __init__(self, console: Console, now: Now, written: Callable[[Status], str] | None = None) -> None:
        self._console = console
        self._now = now
        self._written = written or (lambda status: self._stamped(view.line(status)))
        self._last: object = None
        self._is_away = False

    def show(self, status: Status) -> None:
        """Write the state, if it is another."""
        key = _key(status)
        if key != self._last:
            self._console.out(self._written(status))
        self._last, self._is_away = key, False

    def lost(self, reason: str) -> None:
        """Tell of an outage, once; the next state ends it."""
        if not self._is_away:
            Console(stderr=True, highlight=False).out(self._stamped(f"{reason}; trying again"))
        self._is_away, self._last = True, None

    def _stamped(self, text: str) -> str:
        return f"{output.moment(self._now())} {text}"


class Screen(AbstractContextManager["Screen"]):
    """Shows the newest state, and how old everything is, until the block ends; the last picture stays."""

    def __init__(self, console: Console, now: Now, *, is_wide: bool) -> None:
        self._now = now
        self._is_wide = is_wide
        self._shown = threading.Lock()  # rich draws in a thread of its own
        self._status: Status | None = None
        self._away = ""
        self._live = Live(
            console=console, get_renderable=self._picture, refresh_per_second=_REFRESHES_PER_S, vertical_overflow="crop"
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, status: Status) -> None:
        """Take the newest state."""
        with self._shown:
            self._status, self._away = status, ""

    def lost(self, reason: str) -> None:
        """Say below the last state that the registry is away."""
        with self._shown:
            self._away = reason

    def _picture(self) -> RenderableType:
        with self._shown:
            status, away = self._status, self._away
        if status is None:
            return Text("Connecting ...", "dim")
        picture = view.rendered(status, self._now(), is_wide=self._is_wide)
        return Group(picture, "", Text(f"{output.sentence(away)} Trying again.", "yellow")) if away else picture


def _key(status: Status) -> object:
    """What makes a line worth writing. While a version is tried the message counts seconds and is no news by itself."""
    trial, version = status.trial, status.version
    held = (status.stable, status.candidate, status.pinned, status.paused, version and (version.version, version.phase))
    if trial is None:
        return held, status.message
    pods = status.pods if trial.comparison == "pods" else None
    return held, pods, (trial.step, trial.verdict, trial.slices, trial.failures)

"""A state that changes: redrawn in place on a terminal, one line per change in a pipe."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from updraft_chassis.errors import Unavailable
from updraft_cli import output
from updraft_cli.output import Format

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

State = TypeVar("State", bound="DataclassInstance")

INTERRUPTED = 130
"""Exit code of a process that SIGINT ended, as shells report it."""

_REFRESHES_PER_S = 2

_AGAIN_S = 0.1
"""Longer than a finalizer runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A part of a state that gets a line of its own when its `key` changes."""

    name: str
    key: object
    value: "DataclassInstance"
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View(Generic[State]):
    """How a state looks."""

    items: Callable[[State], Sequence[Item] | None]
    """None: the state does not have them, because the registry does not answer."""
    rendered: Callable[..., RenderableType]
    """Called with the state, the time, and `is_wide`."""


def follow(
    states: Generator[State | Unavailable], view: View[State], form: Format, *, is_last: Callable[[State], bool]
) -> State:
    """Show every state until the last; Ctrl-C exits with 130."""
    if form in {"yaml", "name"}:
        raise click.UsageError("a watch goes with -o table, wide or json")
    try:
        with interrupts_again():
            if form == "json" or not sys.stdout.isatty():
                return _shown(states, Lines(output.console(), _now, view, is_json=form == "json"), is_last)
            with Screen(output.console(), _now, view, is_wide=form == "wide") as screen:
                return _shown(states, screen, is_last)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def interrupts_again() -> Iterator[None]:
    """In the block, repeat a Ctrl-C that came during a finalizer: Python ignores exceptions there, and a watch that nothing
    else ends would go on."""
    report, timers = sys.unraisablehook, list[threading.Timer]()

    def ignored(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            timers.append(threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)))
            timers[-1].start()
        else:
            report(unraisable)

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = report
        for timer in timers:
            timer.cancel()


def _shown(
    states: Generator[State | Unavailable], display: "Lines[State] | Screen[State]", is_last: Callable[[State], bool]
) -> State:
    with closing(states):
        for state in states:
            if isinstance(state, Unavailable):
                display.lost(str(state))
                continue
            display.show(state)
            if is_last(state):
                return state
    raise AssertionError("a watch does not end by itself")


def _now() -> datetime:
    return datetime.now(UTC)


class Lines(Generic[State]):
    """Writes a line for each item whose key changed; outages and items that are gone go to stderr."""

    def __init__(
        self, console: Console, now: Callable[[], datetime], view: View[State], *, is_json: bool = False
    ) -> None:
        self._console = console
        self._now = now
        self._view = view
        self._is_json = is_json
        self._keys: dict[str, object] = {}
        self._is_away = False

    def show(self, state: State) -> None:
        items = self._view.items(state)
        if items is None:
            self.lost("the registry does not answer")
            return
        keys = {item.name: item.key for item in items}
        for item in items:
            if self._is_away or item.name not in self._keys or self._keys[item.name] != item.key:
                self._console.out(
                    output.as_json(item.value, indent=None) if self._is_json else self._stamped(item.line)
                )
        for name in self._keys.keys() - keys.keys():
            self._tell(f"{name} is gone")
        self._keys, self._is_away = keys, False

    def lost(self, reason: str) -> None:
        """Report an outage once; the next state ends it."""
        if not self._is_away:
            self._tell(f"{reason}; trying again")
        self._is_away = True

    def _tell(self, text: str) -> None:
        Console(stderr=True, highlight=False).out(self._stamped(text))

    def _stamped(self, text: str) -> str:
        return f"{output.timestamp(self._now())} {text}"


class Screen(AbstractContextManager["Screen[Any]"], Generic[State]):
    """Redraws the newest state, and the age of everything in it; the last picture stays."""

    def __init__(self, console: Console, now: Callable[[], datetime], view: View[State], *, is_wide: bool) -> None:
        self._now = now
        self._view = view
        self._is_wide = is_wide
        self._lock = threading.Lock()  # rich draws in a thread of its own
        self._state: State | None = None
        self._outage = ""
        self._live = Live(
            console=console, get_renderable=self._drawn, refresh_per_second=_REFRESHES_PER_S, vertical_overflow="crop"
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, state: State) -> None:
        with self._lock:
            self._state, self._outage = state, ""

    def lost(self, reason: str) -> None:
        with self._lock:
            self._outage = reason

    def _drawn(self) -> RenderableType:
        with self._lock:
            state, outage = self._state, self._outage
        if state is None:
            return Text("Connecting ...", "dim")
        drawn = self._view.rendered(state, self._now(), is_wide=self._is_wide)
        return Group(drawn, "", Text(f"{output.sentence(outage)} Trying again.", "yellow")) if outage else drawn

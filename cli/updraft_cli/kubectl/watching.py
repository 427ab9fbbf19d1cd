"""Speculators while they change: the whole again and again on a terminal, one line a change into a pipe.

The API server's watch is begun anew every minute from a listing, so nothing that it loses is lost for longer.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from updraft_chassis.errors import Unavailable
from updraft_chassis.retry import Backoff
from updraft_cli import output
from updraft_cli.backends.cluster import Cluster
from updraft_cli.backends.objects import Json, Speculator
from updraft_cli.kubectl import listings
from updraft_cli.kubectl.listings import Speculators
from updraft_cli.kubectl.pictures import line, rendered_speculators

Now = Callable[[], datetime]

_REFRESHES_PER_S = 2


class Display(Protocol):
    """Where speculators are shown."""

    def show(self, listing: Speculators) -> None:
        """Take what there is now."""

    def lost(self, reason: str) -> None:
        """Take that the API server is away; `show` says that it is back."""


def watch(cluster: Cluster, name: str, display: Display) -> None:
    """Show every state until an error that waiting does not end. Only the first listing has to succeed."""
    backoff, has_begun = Backoff(initial_s=0.5, cap_s=5.0), False
    while True:
        try:
            for listing in _states(cluster, name):
                display.show(listing)
                has_begun = True
                backoff.reset()
        except Unavailable as error:
            if not has_begun:
                raise
            display.lost(str(error))
            time.sleep(next(backoff))


def _states(cluster: Cluster, name: str) -> Iterator[Speculators]:
    listed = cluster.speculators(name)
    found = {_key(item): item for item in listed.items}
    yield listings.speculators(cluster.namespace, found.values())
    for change, item in cluster.changes(name, listed.moment):
        if change == "DELETED":
            found.pop(_key(item), None)
        else:
            found[_key(item)] = item
        yield listings.speculators(cluster.namespace, found.values())


def _key(item: Json) -> tuple[str, str]:
    return item["metadata"]["namespace"], item["metadata"]["name"]


class Lines:
    """Writes a line for each speculator that is another than before."""

    def __init__(self, console: Console, now: Now, *, is_json: bool = False) -> None:
        self._console = console
        self._now = now
        self._is_json = is_json
        self._known: dict[tuple[str, str], Speculator] = {}
        self._is_away = False

    def show(self, listing: Speculators) -> None:
        """Write what changed, what came and what went."""
        found = {(speculator.namespace, speculator.name): speculator for speculator in listing.speculators}
        for key, speculator in found.items():
            if self._known.get(key) != speculator:
                self._write(speculator)
        for namespace, name in self._known.keys() - found.keys():
            Console(stderr=True, highlight=False).out(self._stamped(f"{namespace}/{name} is gone"))
        self._known, self._is_away = found, False

    def lost(self, reason: str) -> None:
        """Tell of an outage, once."""
        if not self._is_away:
            Console(stderr=True, highlight=False).out(self._stamped(f"{reason}; trying again"))
        self._is_away = True

    def _write(self, speculator: Speculator) -> None:
        self._console.out(output.as_json(speculator, indent=None) if self._is_json else self._stamped(line(speculator)))

    def _stamped(self, text: str) -> str:
        return f"{output.moment(self._now())} {text}"


class Screen(AbstractContextManager["Screen"]):
    """Shows the newest state until the block ends; the last picture stays."""

    def __init__(self, console: Console, now: Now, *, is_wide: bool) -> None:
        self._now = now
        self._is_wide = is_wide
        self._shown = threading.Lock()  # rich draws in a thread of its own
        self._listing: Speculators | None = None
        self._away = ""
        self._live = Live(
            console=console, get_renderable=self._picture, refresh_per_second=_REFRESHES_PER_S, vertical_overflow="crop"
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, listing: Speculators) -> None:
        """Take the newest state."""
        with self._shown:
            self._listing, self._away = listing, ""

    def lost(self, reason: str) -> None:
        """Say below the last state that the API server is away."""
        with self._shown:
            self._away = reason

    def _picture(self) -> RenderableType:
        with self._shown:
            listing, away = self._listing, self._away
        if listing is None:
            return Text("Connecting ...", "dim")
        picture = rendered_speculators(listing, self._now(), is_wide=self._is_wide)
        return Group(picture, "", Text(f"{output.sentence(away)} Trying again.", "yellow")) if away else picture

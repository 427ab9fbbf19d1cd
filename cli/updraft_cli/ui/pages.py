"""The pages: which view and which templates each is made of.

A fragment is a part of a page that is sent again when it changes.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from updraft_chassis.errors import InvalidInput, NotFound
from updraft_cli.backends.differences import difference
from updraft_cli.ui.site import Site
from updraft_cli.ui.views import decisions, fleet, history, learning, overview, rollout, traffic, versions
from updraft_cli.ui.views.charts import ChartTable, charts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Subject of a page."""

    name: str = ""
    """The speculator; empty on the overview."""
    argument: str = ""
    """A version, two versions, a pod, or the way to group pods."""


View = Callable[[Site, Place], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    view: View
    template: str
    fragments: tuple[str, ...]


FRAME = ("notice", "age")
"""The fragments that every page has: whether the backend answers, and how old the page is."""


async def _overview(site: Site, _: Place) -> dict[str, Any]:
    return {"view": overview.overview(site.observer.snapshot)}


async def _rollout(site: Site, place: Place) -> dict[str, Any]:
    one = site.one(place.name)
    return {
        "view": rollout.rollout(one, site.observer.snapshot.time),
        "actions": decisions.actions(one, await site.refusal(place.name)),
    }


async def _versions(site: Site, place: Place) -> dict[str, Any]:
    return {"view": versions.versions(site.one(place.name))}


async def _version(site: Site, place: Place) -> dict[str, Any]:
    one, number = site.one(place.name), number_of(place.argument)
    details = await site.observer.call(site.observer.backend.about(place.name).draft, number)
    refusal = await site.refusal(place.name)
    return {
        "view": versions.version(details),
        "actions": decisions.version_actions(one, details.draft, refusal),
    }


async def _diff(site: Site, place: Place) -> dict[str, Any]:
    old, _, new = place.argument.partition("/")
    backend = site.observer.backend.about(place.name)
    before = await site.observer.call(backend.draft, number_of(old))
    after = await site.observer.call(backend.draft, number_of(new))
    return {"view": versions.diff(difference(before, after))}


async def _learning(site: Site, place: Place) -> dict[str, Any]:
    snapshot = site.observer.snapshot
    return {
        "view": learning.learning(site.one(place.name), snapshot.installation.about(place.name), snapshot.time),
    }


async def _fleet(site: Site, place: Place) -> dict[str, Any]:
    return {"view": fleet.fleet(site.one(place.name), place.argument, site.observer.snapshot.time)}


async def _pod(site: Site, place: Place) -> dict[str, Any]:
    one = site.one(place.name)
    if not place.argument:
        raise NotFound("an address of a pod ends with its name")
    details = await site.observer.call(site.observer.backend.about(place.name).pod, place.argument)
    return {"view": fleet.pod_page(details, one.speculator, site.observer.snapshot.time)}


async def _traffic(site: Site, place: Place) -> dict[str, Any]:
    return {
        "view": traffic.traffic(site.one(place.name), site.observer.snapshot.installation.about(place.name)),
    }


async def _history(site: Site, place: Place) -> dict[str, Any]:
    one = site.one(place.name)
    return {
        "table": history.history_table(one.name, one.history),
        "actions": decisions.actions(one, await site.refusal(place.name)),
    }


PAGES: Mapping[str, Page] = {
    "overview": Page(view=_overview, template="overview.html", fragments=("speculators",)),
    "rollout": Page(view=_rollout, template="rollout.html", fragments=("rollout", "actions")),
    "versions": Page(view=_versions, template="versions.html", fragments=("lineage", "versions")),
    "version": Page(view=_version, template="version.html", fragments=()),
    "diff": Page(view=_diff, template="diff.html", fragments=()),
    "learning": Page(view=_learning, template="learning.html", fragments=("learning",)),
    "fleet": Page(view=_fleet, template="fleet.html", fragments=("summary", "pods")),
    "pod": Page(view=_pod, template="pod.html", fragments=("pod",)),
    "traffic": Page(view=_traffic, template="traffic.html", fragments=("traffic",)),
    "history": Page(view=_history, template="history.html", fragments=("actions", "history")),
}


def charts(site: Site, page: str, place: Place) -> dict[str, tuple[ChartTable, ...]]:
    """Return the charts of a page by speculator; the overview has those of all."""
    snapshot, samples = site.observer.snapshot, site.observer.samples
    is_here = bool(snapshot.installation.processes)
    shown = [one for one in snapshot.speculators if place.name in ("", one.name)]
    tables = {one.name: charts_of(page, samples(one.name), one, is_on_this_machine=is_here) for one in shown}
    return {name: found for name, found in tables.items() if found}


async def fragments(site: Site, page: str, place: Place) -> dict[str, str]:
    """Return the inner HTML of a page's fragments, by name; a page without its own asks the backend nothing."""
    own = PAGES[page].fragments
    values = {**site.frame(page, place.name), **(await PAGES[page].view(site, place) if own else {})}
    return {name: site.render(f"fragments/{name}.html", values) for name in (*FRAME, *own)}


def frame_fragments(site: Site, page: str, place: Place, *, problem: str = "") -> dict[str, str]:
    """Return the fragments that every page has; `problem` is that of one page."""
    values = site.frame(page, place.name)
    values["problem"] = problem or values["problem"]
    return {name: site.render(f"fragments/{name}.html", values) for name in FRAME}


def number_of(text: str) -> int:
    """Return the number of a version in an address; InvalidInput if it is none."""
    if not text.isascii() or not text.isdecimal() or len(text) > int(math.log10(2**32)):
        raise InvalidInput(f"{text!r} is not the number of a version")
    return int(text)

"""The history of a speculator: every change, with its reason and who caused it."""

from collections.abc import Iterable, Iterator

from updraft_cli import output
from updraft_cli.backends.drafts import HistoryEntry
from updraft_cli.ui.views import parts
from updraft_cli.ui.views.parts import Cell, Table


def history_table(name: str, entries: Iterable[HistoryEntry], *, has_version: bool = True) -> Table:
    """Newest first; without a version, of one version alone."""
    columns = ("time (UTC)", *((">version",) if has_version else ()), "became", "was", "by", "why")
    rows = [tuple(_row(name, entry, has_version=has_version)) for entry in reversed(tuple(entries))]
    return parts.table(columns, rows, caption="History, newest first", empty=f"{name} has no history yet.")


def _row(name: str, entry: HistoryEntry, *, has_version: bool) -> Iterator[Cell]:
    yield Cell(text=output.timestamp(entry.time), css="mono")
    if has_version:
        href = f"/s/{name}/versions/{entry.version}" if entry.version else ""
        yield Cell(text=str(entry.version or parts.NONE), href=href, css="num")
    yield parts.phase(entry.phase) if entry.phase else Cell(text=parts.NONE)
    yield Cell(text=entry.before or parts.NONE, css="quiet")
    yield Cell(text=entry.actor)
    yield Cell(text=entry.reason)

"""Tables for a person, JSON for a program; both from the same plain values."""

import dataclasses
import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Format = Literal["table", "json"]

_WIDE = 10_000
"""Columns of a file or a pipe: a program that reads a table wants one row on one line."""


def console() -> Console:
    """Return the console of stdout; into a pipe, lines are not wrapped."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


def table(*columns: str) -> Table:
    """Return an empty table without lines; a column named with a leading `>` is right-aligned."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return made


def dump(value: "DataclassInstance") -> str:
    """Return a dataclass as indented JSON; times in ISO 8601."""
    return json.dumps(dataclasses.asdict(value), indent=2, default=_plain)


def short(digest: str) -> str:
    """Return enough of "sha256:..." to tell digests apart."""
    return digest.removeprefix("sha256:")[:12]


def ago(time: datetime) -> str:
    """Return how long ago `time` was, in its largest unit."""
    seconds = max(0, int((datetime.now(UTC) - time).total_seconds()))
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds // length_s} {unit} ago"
    return f"{seconds} s ago"


def size(num_bytes: int) -> str:
    """Return a size in MB or kB."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1_000_000 else f"{num_bytes / 1e3:.1f} kB"


def percents(shares: tuple[float, ...]) -> str:
    """Return shares as `62 % 41 % 20 %`."""
    return " ".join(f"{share:.0%}" for share in shares) or "-"


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no place in JSON")

"""What a command found, in the form that was asked for: a table for a person, JSON or YAML for a program.

All forms come from the same plain values. Colours and the width are the terminal's; into a pipe a row is one line.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Format = Literal["table", "wide", "json", "yaml", "name"]

_WIDE = 10_000
"""Columns of a file or a pipe: a program that reads a table wants one row on one line."""

_ROOM = 160
"""Columns that wide tables need to fold their last column, and only that."""

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def console() -> Console:
    """Return the console of stdout; into a pipe, lines are not wrapped. Texts are what somebody wrote, and no markup."""
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else _WIDE)


def show(
    value: "DataclassInstance | BaseModel",
    form: Format,
    *,
    names: Iterable[object],
    rendered: Callable[..., RenderableType],
) -> None:
    """Print a value: `rendered(is_wide=...)` for a person, `names` one a line, or all of it for a program."""
    match form:
        case "json":
            console().out(as_json(value))
        case "yaml":
            console().out(as_yaml(plain(value)), end="")
        case "name":
            for name in names:
                console().out(str(name))
        case "table" | "wide":
            _print(rendered(is_wide=form == "wide"), is_wide=form == "wide")


def plain(value: "DataclassInstance | BaseModel") -> Any:
    """Return a value as dicts, lists, texts and numbers; times in ISO 8601."""
    return json.loads(as_json(value))


def as_json(value: "DataclassInstance | BaseModel", *, indent: int | None = 2) -> str:
    """Return a value as JSON; times in ISO 8601."""
    return json.dumps(value, indent=indent, default=_plain, allow_nan=False, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """Return plain values as YAML, in their own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=_WIDE)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Tell a terminal that something takes a while; stderr, so that stdout is only the answer."""
    with Console(stderr=True).status(Text(what)):
        yield


def table(*columns: str) -> Table:
    """Return an empty table without lines. `>` before a name: to the right. `~`, and the last column: folded where it must.

    All others keep their width, so that a long reason is what gives way on a narrow terminal.
    """
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        is_folded = column.startswith("~") or column is columns[-1]
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        made.add_column(column.lstrip(">~"), justify=justify, no_wrap=not is_folded, overflow="fold")
    return made


def cut(text: str) -> Text:
    """Return a cell that is cut rather than folded."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Return names and values, without a header."""
    made = table("", "")
    made.show_header = False
    for name, value in rows:
        made.add_row(Text(name, "dim"), value)
    return made


def sentence(text: str) -> str:
    """Return a message with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


def short(digest: str) -> str:
    """Return enough of "sha256:..." to tell digests apart."""
    return digest.removeprefix("sha256:")[:12]


def ago(time: datetime, now: datetime) -> str:
    """Return how long ago `time` was, in its largest unit."""
    seconds = max(0, int((now - time).total_seconds()))
    unit, length_s = next(((unit, length_s) for unit, length_s in _UNITS if seconds >= length_s), _UNITS[-1])
    return f"{seconds // length_s} {unit} ago"


def span(seconds: float) -> str:
    """Return a length of time in its two largest units: `2 min 5 s`."""
    left = max(0, round(seconds))
    parts = []
    for unit, length_s in _UNITS:
        count, left = divmod(left, length_s)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"


def moment(time: datetime) -> str:
    """Return a time to the second, UTC."""
    return f"{time:%Y-%m-%d %H:%M:%S}"


def size(num_bytes: int) -> str:
    """Return a size in MB or kB."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1_000_000 else f"{num_bytes / 1e3:.1f} kB"


def percents(shares: tuple[float, ...]) -> str:
    """Return shares as `62 % 41 % 20 %`."""
    return " ".join(f"{100 * share:.0f} %" for share in shares) or "-"


def count(number: int, noun: str) -> str:
    """Return `1 pod`, `2 pods`."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def _print(picture: RenderableType, *, is_wide: bool) -> None:
    """Print it; what is wide and does not fit is left to the terminal to break, rather than cut."""
    out = console()
    if not out.is_terminal:
        with out.capture() as capture:
            out.print(picture)
        out.out("\n".join(line.rstrip() for line in capture.get().splitlines()))  # a table pads its last column
        return
    if is_wide and out.width < _ROOM:
        out.width = _WIDE
    out.print(picture)


def _plain(value: Any) -> Any:
    """What JSON lacks; for every value that it meets."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no place in JSON")

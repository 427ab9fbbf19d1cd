"""Output of the commands: a table for a person, JSON or YAML for a program, from the same plain values.

Colours and width follow the terminal; in a pipe, a row is one line.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
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
"""Columns of a file or a pipe, so that each row is one line."""

_ROOM = 160
"""Columns from which wide tables fold only their last column."""

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def console() -> Console:
    """Return the console of stdout; in a pipe, lines are not wrapped. Texts come from users and are not markup."""
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else _WIDE)


def show(
    value: "DataclassInstance | BaseModel",
    form: Format,
    *,
    names: Iterable[object],
    rendered: Callable[..., RenderableType],
) -> None:
    """Print a value: `rendered(is_wide=...)` for a person, `names` one per line, or all of it for a program."""
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
    return json.dumps(value, indent=indent, default=_plain, allow_nan=False, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """Return plain values as YAML, in their own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=_WIDE)


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested dicts, with their paths: `analysis.confidence`."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@contextmanager
def waiting(activity: str) -> Iterator[None]:
    """Show a long activity on stderr, so that stdout has only the answer."""
    with Console(stderr=True).status(Text(activity)):
        yield


def table(*columns: str) -> Table:
    """Return an empty table without lines. `>` before a name aligns right; `~`, and the last column, may be folded.

    All others keep their width, so that on a narrow terminal only a long reason is folded.
    """
    table_ = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        is_folded = column.startswith("~") or column is columns[-1]
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table_.add_column(column.lstrip(">~"), justify=justify, no_wrap=not is_folded, overflow="fold")
    return table_


def cut(text: str) -> Text:
    """Return a cell that is truncated instead of folded."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Return names and values, without a header."""
    rows_table = table("", "")
    rows_table.show_header = False
    for name, value in rows:
        rows_table.add_row(Text(name, "dim"), value)
    return rows_table


def sentence(text: str) -> str:
    """Return a message with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


def short(digest: str) -> str:
    """Return enough of "sha256:..." to distinguish digests."""
    return digest.removeprefix("sha256:")[:12]


def ago(time: datetime, now: datetime) -> str:
    """Return how long ago `time` was, in its largest unit."""
    seconds = max(0, int((now - time).total_seconds()))
    unit, length_s = next(((unit, length_s) for unit, length_s in _UNITS if seconds >= length_s), _UNITS[-1])
    return f"{seconds // length_s} {unit} ago"


def span(seconds: float) -> str:
    """Return a duration in its two largest units: `2 min 5 s`."""
    left = max(0, round(seconds))
    parts = []
    for unit, length_s in _UNITS:
        count, left = divmod(left, length_s)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"


def timestamp(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}"


def resource(kind: str, name: str) -> str:
    """Return a name as kubectl takes it."""
    return f"{kind}.updraft.dev/{name}"


def speculator_name(name: str, namespace: str) -> str:
    """Return a speculator's name for `-o name`."""
    return resource("adaptivespeculator", name) if namespace else name


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1_000_000 else f"{num_bytes / 1e3:.1f} kB"


def percents(shares: tuple[float, ...]) -> str:
    return " ".join(f"{100 * share:.0f} %" for share in shares) or "-"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def _print(content: RenderableType, *, is_wide: bool) -> None:
    """Print it; a wide table that does not fit is wrapped by the terminal instead of truncated."""
    out = console()
    if not out.is_terminal:
        with out.capture() as capture:
            out.print(content)
        out.out("\n".join(line.rstrip() for line in capture.get().splitlines()))  # a table pads its last column
        return
    if is_wide and out.width < _ROOM:
        out.width = _WIDE
    out.print(content)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")

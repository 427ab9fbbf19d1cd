"""The chart's README, with a table of values generated from the comments in values.yaml.

The comment lines directly above a value describe it. A comment above a map becomes the row above the map's values.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path

import yaml
from tools import markdown

CHART = Path("charts") / "updraft"
_BEGIN, _END = "<!-- values -->\n", "<!-- end of values -->\n"
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z_]+):(?P<rest>.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A value, or a map of values, in values.yaml."""

    path: tuple[str, ...]
    meaning: str
    default: object


def readme(chart: Path) -> str:
    """The chart's README with its current table of values."""
    before, begin, rest = (chart / "README.md").read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert end, "README.md lacks the marks around its table"
    return "".join((before, begin, table(chart / "values.yaml"), end, after))


def table(path: Path) -> str:
    """One row per value, and one for each map with a comment."""
    values = list(documented(path))
    maps = {value.path[:length] for value in values for length in range(1, len(value.path))}
    rows = [
        (f"`{'.'.join(value.path)}`", "" if value.path in maps else _default(value.default), value.meaning)
        for value in values
    ]
    return markdown.table(("value", "default", "meaning"), rows)


def documented(path: Path) -> Iterator[Value]:
    """Every value with a comment, in the order of the file."""
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip().removeprefix("#").strip())
            continue
        if match := _KEY.match(line):
            indent = len(match["indent"])
            parents = [*(parent for parent in parents if parent[0] < indent), (indent, match["key"])]
            keys = tuple(key for _, key in parents)
            if comment:
                yield Value(path=keys, meaning=" ".join(comment), default=reduce(getitem, keys, values))
        comment = []


def _default(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"

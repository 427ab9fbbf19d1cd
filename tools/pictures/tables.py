"""Reads figures out of the tables of docs/benchmarks.md, so that a chart never has a figure that the page does not have."""

import re
from dataclasses import dataclass

_SEPARATOR = re.compile(r"^\|(?:\s*:?-+:?\s*\|)+$")
_NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"


@dataclass(frozen=True, slots=True)
class Figure:
    """A value, and its interval where the cell has one: `1.66x (1.35 to 2.19)`."""

    value: float
    text: str
    low: float | None = None
    high: float | None = None
    is_bold: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of a table, without its heads."""

    heads: list[str]
    rows: list[list[str]]

    def row(self, label: str) -> list[str]:
        """The cells after the row's label. Raises KeyError without such a row."""
        for cells in self.rows:
            if cells[0] == label:
                return cells[1:]
        raise KeyError(f"the table has no row {label!r}")


def table(page: str, heading: str, number: int = 0) -> Table:
    """A table below a heading of level 2, counted from 0. Raises KeyError without one."""
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if section is None:
        raise KeyError(f"the page has no heading {heading!r}")
    blocks = re.findall(r"(?:^\|.*\n)+", section[1], re.MULTILINE)
    if number >= len(blocks):
        raise KeyError(f"{heading!r} has {len(blocks)} tables")
    rows = [line.strip() for line in blocks[number].splitlines()]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not _SEPARATOR.match(row)]
    return Table(heads=cells[0], rows=cells[1:])


def figure(cell: str) -> Figure:
    """Parse a cell. Raises ValueError if it does not begin with a number."""
    plain = cell.replace("**", "")
    match = re.match(rf"({_NUMBER})", plain)
    if match is None:
        raise ValueError(f"{cell!r} does not begin with a number")
    interval = re.search(rf"\(({_NUMBER}) to ({_NUMBER})\)", plain)
    low, high = (_number(interval[1]), _number(interval[2])) if interval else (None, None)
    return Figure(value=_number(match[1]), text=match[1], low=low, high=high, is_bold="**" in cell)


def _number(text: str) -> float:
    return float(text.replace(",", ""))

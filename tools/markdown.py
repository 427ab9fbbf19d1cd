"""Tables, and wrapped prose, so that the sources of generated Markdown pages do not have to be written to a width."""

import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 126
_MARKER = re.compile(r"\s*(?:[-*]|\d+\.)\s+")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. Each cell is written on one line, with its `|` escaped."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)) + "\n"


def wrapped(page: str) -> str:
    """The page with every wide paragraph and list item wrapped; tables, code, headings and comments stay as they are."""
    lines, is_code = [], False
    for line in page.splitlines():
        is_code ^= line.lstrip().startswith("```")
        is_prose = not is_code and not line.startswith(("|", "#", "<", "    "))
        lines += _wrapped_line(line) if is_prose and len(line) > WIDTH else [line]
    return "\n".join(lines) + "\n"


def _wrapped_line(line: str) -> list[str]:
    marker = _MARKER.match(line)
    indent = " " * len(marker[0]) if marker else ""
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

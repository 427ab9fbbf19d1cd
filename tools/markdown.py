"""Wraps the prose of generated Markdown pages, so that sources do not have to be written to a width."""

import re
import textwrap

WIDTH = 126
_MARKER = re.compile(r"\s*(?:[-*]|\d+\.)\s+")


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

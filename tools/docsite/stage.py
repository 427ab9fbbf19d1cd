"""Copies the pages to where the site is built from, with their links rewritten to the site's paths.

The pages are written for GitHub and a terminal, and stay so. They are followed through their links, from the navigation on:
a file or folder of the checkout that a page links to becomes a page too. A link to nothing is an error.
"""

import json
import os
import re
from pathlib import Path

from tools.docsite import navigation
from tools.docsite.paths import PICTURES, on_site
from tools.docsite.source_page import source_page

CONFIGURATION = Path(__file__).with_name("zensical.toml")
STYLE = Path(__file__).with_name("site.css")

_CODE = re.compile(r"(^ *(?:`{3,}).*?^ *`{3,}$|(?<!`)`[^`\n]+`(?!`))", re.MULTILINE | re.DOTALL)
_CONTENTS = re.compile(r"(?:^- \[[^\]]+\]\(#[^)]+\)\n)+\n", re.MULTILINE)
"""A page's list of its own headings, which the site shows at the side."""
_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
_ELSEWHERE = ("http://", "https://", "#")


class BrokenLinkError(Exception):
    """A page links to something that is not in the checkout; the message names both."""


def stage(checkout: Path, into: Path) -> int:
    """Write pages, pictures and configuration below `into`, remove others, and return their number. Raises BrokenLinkError.

    A file that did not change is not written again, so a running preview rebuilds only what changed.
    """
    written = {
        _write(into / "zensical.toml", _configuration(checkout)),
        _write(into / "pages" / STYLE.name, STYLE.read_bytes()),
    }
    waiting = navigation.sources(checkout)
    known = set(waiting)
    while waiting:
        source = waiting.pop()
        content, linked = staged(checkout, source)
        written.add(_write(into / "pages" / on_site(source), content))
        waiting += sorted(linked - known)
        known |= linked
    for stale in {path for path in (into / "pages").rglob("*") if path.is_file()} - written:
        stale.unlink()
    return len(written)


def staged(checkout: Path, source: Path) -> tuple[bytes, set[Path]]:
    """The content on the site of a file or folder (relative to the checkout), and the files that it links to."""
    if source.suffix in PICTURES:
        return (checkout / source).read_bytes(), set()
    if source.suffix != ".md":
        return source_page(checkout, source).encode(), set()
    return _page(checkout, source)


def _page(checkout: Path, source: Path) -> tuple[bytes, set[Path]]:
    linked: set[Path] = set()

    def rewritten(match: re.Match[str]) -> str:
        if match[0].startswith(_ELSEWHERE):
            return match[0]
        name, _, heading = match[0].partition("#")
        target = Path(os.path.normpath(source.parent / name))
        if not (checkout / target).exists():
            raise BrokenLinkError(f"{source} links to {match[0]}, which does not exist")
        linked.add(target)
        link = os.path.relpath(on_site(target), on_site(source).parent)
        return f"{link}#{heading}" if heading else link

    text = (checkout / source).read_text(encoding="utf-8")
    parts = _CODE.split(_ROW.sub(_without_escapes, _CONTENTS.sub("", text)))
    prose_and_code = [part if number % 2 else _LINK.sub(rewritten, part) for number, part in enumerate(parts)]
    return "".join(prose_and_code).encode(), linked


def _without_escapes(row: re.Match[str]) -> str:
    """A row of a table whose code has its `|` as it is: GitHub wants `\\|` there, and Python-Markdown would show it."""
    return re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0])


def _configuration(checkout: Path) -> bytes:
    return (
        CONFIGURATION.read_text(encoding="utf-8")
        .replace("nav = []", f"nav = {_toml(navigation.entries(checkout))}")
        .encode()
    )


def _toml(value: "str | list[navigation.Entry] | navigation.Entry") -> str:
    match value:
        case str():
            return json.dumps(value)  # a JSON string is a TOML string
        case list():
            return f"[{', '.join(_toml(one) for one in value)}]"
        case dict():
            return f"{{{', '.join(f'{json.dumps(key)} = {_toml(one)}' for key, one in value.items())}}}"


def _write(path: Path, content: bytes) -> Path:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path

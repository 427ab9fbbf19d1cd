"""Pages for what is no Markdown: a file as a listing, a folder as a table of its modules."""

import re
from pathlib import Path

_LANGUAGES = {".py": "python", ".proto": "protobuf", ".yaml": "yaml", ".toml": "toml"}
_NO_SEARCH = "---\nsearch:\n  exclude: true\n---\n\n"
"""A search should find explanations, not code."""


def source_page(checkout: Path, path: Path) -> str:
    """The page of a file or folder, which is relative to the checkout."""
    source = checkout / path
    body = _folder(source) if source.is_dir() else _listing(source)
    return f"{_NO_SEARCH}# {path}\n\n{body}"


def _listing(source: Path) -> str:
    text = source.read_text(encoding="utf-8")
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{_LANGUAGES.get(source.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _folder(source: Path) -> str:
    rows = [
        f"| `{module.relative_to(source)}` | {idea} |"
        for module in sorted(source.rglob("*.py"))
        if (idea := _idea(module))
    ]
    return "\n".join(["| module | what it is for |", "|---|---|", *rows]) + "\n"


def _idea(module: Path) -> str:
    """The first paragraph of a module's docstring on one line; generated code has none."""
    paragraph = re.match(r'"""(.+?)(?:\n\n|""")', module.read_text(encoding="utf-8"), re.DOTALL)
    return re.sub(r"([|<>\[\]*_])", r"\\\1", " ".join(paragraph[1].split())) if paragraph else ""

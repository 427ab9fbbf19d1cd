"""Where a file of the checkout stands on the site.

Pages and pictures keep their paths without docs/. A README of the docs is the index of its folder; one elsewhere is a page like
others, because the navigation shows an index as the heading of its section. Other files and folders that a page links to become
pages below `source/`, so a reader of the site needs no checkout and no repository host.
"""

from pathlib import Path

PICTURES = {".svg", ".png"}

_PLACES = {Path("SECURITY.md"): Path("threat-model.md")}
"""Pages whose names would be those of others: this one's of docs/security.md."""


def on_site(path: Path) -> Path:
    """The place of a file or folder; both paths are relative, to the checkout and to the site's root."""
    if path in _PLACES:
        return _PLACES[path]
    if path.suffix not in PICTURES | {".md"}:
        return Path("source", f"{path}.md")
    is_index = path.name == "README.md" and path.parts[0] in {"docs", "README.md"}
    below = path.relative_to("docs") if path.is_relative_to("docs") else path
    return below.with_name("index.md" if is_index else path.name.lower())

"""The site's navigation: sections by what a reader wants, and in each the pages that lead there.

Decisions and reference pages are listed from their folders, so a new one needs no line here. Every other page of docs/ does:
a test fails until it has one.
"""

import re
from pathlib import Path

from tools.docsite.paths import on_site

Entry = dict[str, "str | list[Entry]"]
"""A title, and the page or the entries under it."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": (
        "README.md",
        "docs/quickstart.md",
        "docs/console.md",
        "docs/tour.md",
        "docs/models.md",
        "docs/openai.md",
        "docs/cli.md",
        "docs/kubectl.md",
    ),
    "Concepts": (
        "docs/pictures.md",
        "docs/concepts.md",
        "docs/learning.md",
        "docs/rollout.md",
        "docs/gate.md",
        "docs/transfer.md",
        "docs/architecture.md",
        "docs/glossary.md",
    ),
    "Operate": (
        "docs/install.md",
        "docs/gitops.md",
        "docs/images.md",
        "docs/operator.md",
        "docs/attach.md",
        "docs/operations.md",
        "docs/runbooks.md",
        "docs/sglang.md",
        "docs/vllm.md",
        "docs/tenants.md",
        "docs/security.md",
        "SECURITY.md",
        "docs/upgrade.md",
        "docs/api-policy.md",
    ),
    "Reference": ("docs/reference/*.md", "charts/updraft/README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    "Decisions": ("docs/adr/README.md", "docs/adr/0*.md"),
    "Benchmarks": ("docs/benchmarks.md", "bench/README.md"),
}


def sources(checkout: Path) -> list[Path]:
    """The pages of the navigation, relative to the checkout, in its order."""
    return [page for patterns in SECTIONS.values() for page in _found(checkout, patterns)]


def entries(checkout: Path) -> list[Entry]:
    """The navigation, with the pages' own first headings as titles and their paths on the site."""
    return [
        {section: [{_title(checkout / page): str(on_site(page))} for page in _found(checkout, patterns)]}
        for section, patterns in SECTIONS.items()
    ]


def _found(checkout: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The pages that the patterns match. Raises FileNotFoundError for a pattern without a page."""
    pages: list[Path] = []
    for pattern in patterns:
        matches = [path.relative_to(checkout) for path in sorted(checkout.glob(pattern))]
        if not matches:
            raise FileNotFoundError(f"the navigation names {pattern}, but there is no such page")
        pages += matches
    return pages


def _title(page: Path) -> str:
    """Its first heading, which generated pages have below a comment."""
    heading = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1].replace("`", "") if heading else page.stem

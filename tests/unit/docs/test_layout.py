"""The shape of the tree: small folders, and pages that fit a terminal."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("libs", "services", "operator", "cli")
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md"), *ROOT.glob("charts/**/*.md")]
)
EACH_PAGE = pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
MAX_MODULES = 15
MAX_COLUMNS = 128


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_has_more_than_fifteen_modules(package: str) -> None:
    num_modules = Counter(path.parent for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): num for folder, num in num_modules.items() if num > MAX_MODULES} == {}


@EACH_PAGE
def test_no_line_of_a_page_but_a_tables_is_wider_than_128_columns(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    wide = [line for line in prose.splitlines() if len(line) > MAX_COLUMNS and not line.startswith("|")]
    assert wide == []


@EACH_PAGE
def test_no_title_begins_with_what_or_of(page: Path) -> None:
    assert not re.findall(r"^#+ (?:What|Of)\b.*", page.read_text(), re.MULTILINE)


def test_the_readme_is_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120

"""What the docs name exists: files, headings, verbs, commands, settings, metrics. So they cannot go stale unseen."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from tools import reference

from updraft_cli.__main__ import cli
from updraft_cli.kubectl import plugin

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("bench/**/*.md"),
    ]
)

_variables = functools.cache(reference.variables)
_metric_names = functools.cache(reference.metric_names)

_COMMAND = r"\b(kubectl )?updraft((?: [a-z]+)+)"
"""The command line's words, and whether the plugin's."""
_HELM = re.compile(r"\bhelm [^\n]*")
"""There `updraft` is the name of a release."""

each_page = pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = [link for link in _links(page) if not _leads_somewhere(page, link)]
    assert broken == []


@each_page
def test_make_has_every_verb(page: Path) -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {verb for code in _code(page) for verb in re.findall(r"\bmake ([a-z][a-z-]*)", code)}
    assert used <= verbs


@each_page
def test_the_command_line_has_every_command(page: Path) -> None:
    used = [found for code in _code(page) for found in re.findall(_COMMAND, _HELM.sub("", code))]
    assert [words for plugged, words in used if not _is_command(plugin if plugged else cli, words)] == []


@each_page
def test_every_variable_is_a_setting(page: Path) -> None:
    known = _variables()
    used = set(re.findall(r"\bUPDRAFT_[A-Z_]*[A-Z]\b", page.read_text()))
    assert {name for name in used if name not in known} == set()


@each_page
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    assert re.findall(r"\b(?:FIGURES?|TBD|TODO|FIXME|TK|XXX|PLACEHOLDER)\b|\?\?\?|lorem ipsum", page.read_text()) == []


@each_page
def test_every_path_of_a_test_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w/])tests/[\w/.-]*\w", page.read_text()))
    assert {path for path in named if not (ROOT / path).exists()} == set()


@each_page
def test_every_metric_is_one_of_ours(page: Path) -> None:
    used = {
        name
        for code in _code(page)
        for name in re.findall(r"\bupdraft_(?:inference|operator|registry|trainer)_[a-z_]+", code)
    }
    assert used <= _metric_names()


def test_the_reference_names_nothing_of_this_machine() -> None:
    for text in reference.pages().values():
        assert str(Path.home()) not in text


def test_every_decision_is_in_the_list() -> None:
    decisions = {path.name for path in (ROOT / "docs/adr").glob("0*.md")}
    assert decisions == {link for link in _links(ROOT / "docs/adr/README.md") if link.startswith("0")}


def _links(page: Path) -> Iterator[str]:
    """Targets of links and pictures, without those of the web."""
    prose = re.sub(r"```.*?```|(?<!`)`[^`\n]+`(?!`)", "code", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith(("http://", "https://")):
            yield target


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    file = (page.parent / name).resolve() if name else page
    return file.exists() and (not heading or heading in _headings(file))


def _headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def _code(page: Path) -> list[str]:
    """Everything that is set as code, in blocks and in lines."""
    text = page.read_text()
    blocks = re.findall(r"```.*?```", text, flags=re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def _is_command(command: click.Command, words: str) -> bool:
    """Whether the words lead from a program to a command; what follows one is its arguments."""
    for word in words.split():
        if not isinstance(command, click.Group):
            return True
        if word not in command.commands:
            return False
        command = command.commands[word]
    return True

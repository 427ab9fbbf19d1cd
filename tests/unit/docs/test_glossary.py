"""Names that the glossary retired stay out of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GLOSSARY = (ROOT / "docs/glossary.md").read_text()
PACKAGES = ("libs", "services", "operator", "cli")
SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))


def retired_names() -> set[str]:
    """The first column of the table of retired names."""
    table = GLOSSARY.partition("## Retired names")[2]
    return {name for row in re.findall(r"^\|([^|]*)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def names_in(source: str) -> Iterator[str]:
    """Names that a module defines or binds."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.arg():
                yield node.arg
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr


def test_the_glossary_retires_names() -> None:
    assert {"Wish", "Scene", "wish"} <= retired_names()


def test_a_retired_name_is_found_wherever_it_is_bound() -> None:
    source = "class Wish: ...\ndef turn(wish, *, told): said = told\nself.around = 1\nfor seen in x: pass"
    assert {"Wish", "wish", "told", "said", "around", "seen"} <= set(names_in(source))


@pytest.mark.parametrize("package", PACKAGES)
def test_retired_names_stay_out_of_the_code(package: str) -> None:
    retired = retired_names()
    paths = [path for path in SOURCES if path.is_relative_to(ROOT / package)]
    assert paths
    used = {f"{path.relative_to(ROOT)}: {name}" for path in paths for name in set(names_in(path.read_text())) & retired}
    assert used == set()

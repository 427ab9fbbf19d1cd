"""Docstrings begin with their subject or verb, so that they are read once."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("services", "operator", "cli", "libs", "bench", "tools")
RIDDLE = re.compile(r"\s*(What|Of)\b")


def riddles_in(source: str) -> Iterator[str]:
    """Docstrings of modules, classes and functions, and those after fields and constants, that begin with What or Of."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))) if RIDDLE.match(text):
                yield f"{node.lineno}: {text}"


def test_a_docstring_that_begins_with_what_or_of_is_found_wherever_it_is() -> None:
    source = (
        '"""What it is."""\nclass A:\n    """Of B."""\n    size: int\n    """Of it."""\n'
        '    def f(self):\n        """\n        What\'s kept."""\n        self.x = 1\n        """Of x."""\n'
        'LIMIT = 1\n"""Of all."""\n'
    )
    assert len(list(riddles_in(source))) == 6


def test_a_docstring_with_what_or_of_elsewhere_is_no_riddle() -> None:
    source = '"""Whatever is kept of what came."""\n"""Often."""\ntext = "What now?"\n'
    assert list(riddles_in(source)) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_begins_with_what_or_of(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = [f"{path.relative_to(ROOT)}:{riddle}" for path in paths for riddle in riddles_in(path.read_text())]
    assert found == []

"""The digest under which `bench/learning` keeps its runs: what the code does decides, not how it is written down."""

import sys
from pathlib import Path

import pytest
from bench.code_digest import code_digest

FILES = {
    "entry.py": '"""Starts."""\n\nfrom learning_code import rules\n\nfrom learning_code.shown import table\n',
    "rules.py": '"""Rules."""\n\n\ndef rate() -> float:\n    """Per step."""\n    return 0.1\n',
    "shown.py": "def table() -> int:\n    return 3\n",
    "__init__.py": "",
}
FOLLOWED = ("learning_code.rules",)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "learning_code"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "learning_code", raising=False)  # that of another test
    return folder


def digest() -> str:
    return code_digest(["learning_code.entry"], FOLLOWED)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rules.py", '"""Per step."""', '"""Of each step."""\n    # found by a sweep\n'),
        ("rules.py", '"""Rules."""\n', ""),
        ("shown.py", "3", "4"),
    ],
    ids=["a comment and a docstring", "the docstring of a module", "a module that is not followed"],
)
def test_a_change_that_a_run_cannot_see_keeps_the_digest(package: Path, file: str, old: str, new: str) -> None:
    before = digest()
    (package / file).write_text(FILES[file].replace(old, new))
    assert digest() == before


@pytest.mark.parametrize(("file", "old", "new"), [("rules.py", "0.1", "0.2"), ("entry.py", "table", "table as t")])
def test_a_change_of_the_code_or_of_what_it_imports_changes_the_digest(
    package: Path, file: str, old: str, new: str
) -> None:
    before = digest()
    (package / file).write_text(FILES[file].replace(old, new))
    assert digest() != before


def test_a_module_that_is_gone_is_an_error_and_not_another_digest() -> None:
    with pytest.raises(ModuleNotFoundError, match="learning_code_gone"):
        code_digest(["learning_code_gone"], FOLLOWED)

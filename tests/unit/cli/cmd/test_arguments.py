"""Words on the command line: a speculator, a version, or both."""

from typing import Any

import click
import pytest
from click.testing import CliRunner

from updraft_cli.cmd import arguments
from updraft_cli.cmd.program import BackendOptions, Command, Program


def parsed(*words: str, least: int = 1, is_required: bool = True) -> tuple[Any, Any]:
    """The speculator and the version that a command gets; the backend is just the name."""
    got: list[tuple[Any, Any]] = []

    @click.command(cls=Command, needs=("connection",))
    @arguments.version(least=least, is_required=is_required)
    def show(backend: Any, version: Any) -> None:
        got.append((backend, version))

    connect: Any = lambda given, speculator, is_change: speculator  # noqa: E731
    options = BackendOptions(title="", by_need={}, connect=connect)
    program = Program("program", commands=[show], backend_options=options)
    CliRunner().invoke(program, ["show", *words], catch_exceptions=False)
    return got[0]


def test_the_last_word_is_the_version_and_the_word_before_it_a_name() -> None:
    assert parsed("previous", least=0) == (None, "previous")
    assert parsed("qwen", "v3") == ("qwen", 3)
    assert parsed("qwen", "0", least=0) == ("qwen", 0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (None, None)),
        (("3",), (None, 3)),
        (("v3",), (None, 3)),
        (("stable",), (None, "stable")),
        (("qwen",), ("qwen", None)),
        (("qwen", "stable"), ("qwen", "stable")),
    ],
)
def test_where_no_version_is_needed_a_single_word_is_one_only_if_it_looks_like_one(
    words: tuple[str, ...], expected: tuple[Any, Any]
) -> None:
    assert parsed(*words, is_required=False) == expected

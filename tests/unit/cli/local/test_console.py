"""The console beside a stack never holds it up."""

from pathlib import Path

from updraft_cli.local.console import console


def test_a_console_that_cannot_start_or_is_ended_at_once_is_only_silent(tmp_path: Path) -> None:
    addresses: list[str] = []
    with console(tmp_path, "127.0.0.1:1", addresses.append):
        pass
    assert addresses == []

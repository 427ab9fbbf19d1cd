"""How options choose the registry and the speculator."""

from pathlib import Path

from updraft_cli.cmd.registry_options import connect


def test_only_the_name_argument_filters_the_status(tmp_path: Path) -> None:
    given = {"data": tmp_path, "registry": "127.0.0.1:1", "speculator": "qwen"}
    by_option, by_argument = connect(given, None), connect(given, "gemma")
    assert (by_option.speculator, by_option.is_one) == ("qwen", False)
    assert (by_argument.speculator, by_argument.is_one) == ("gemma", True)

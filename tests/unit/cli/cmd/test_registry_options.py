"""How options choose the registry and the speculator."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tests.support.stacks import start

from updraft_chassis.errors import Conflict, InvalidInput
from updraft_cli.__main__ import cli
from updraft_cli.cmd import draft
from updraft_cli.cmd.program import Command
from updraft_cli.cmd.registry_options import connect
from updraft_cli.cmd.rollout.commands import rollout
from updraft_cli.local.process import ProcessState
from updraft_cli.local.running import noted

LOOKS = {"list", "show", "diff", "history", "pull", "status", "watch"}


def test_only_the_name_argument_filters_the_status(tmp_path: Path) -> None:
    given = {"data": tmp_path, "registry": "127.0.0.1:1", "speculator": "qwen"}
    by_option, by_argument = connect(given, None), connect(given, "gemma")
    assert (by_option.speculator, by_option.is_one) == ("qwen", False)
    assert (by_argument.speculator, by_argument.is_one) == ("gemma", True)


def test_a_name_to_expect_in_a_certificate_needs_the_cas() -> None:
    with pytest.raises(InvalidInput, match="--server-name needs --ca-file"):
        connect({"registry": "127.0.0.1:1", "server_name": "qwen-registry.team.svc"}, None)


def test_a_change_needs_to_know_which_of_two_stacks_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path / "share"), "XDG_STATE_HOME": str(tmp_path / "state")}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with noted(start(tmp_path / "other"), environ):
        start(tmp_path / "share" / "updraft")
        assert connect({}, None).address == ""
        with pytest.raises(Conflict, match="2 stacks run on this machine; choose one with --data"):
            connect({}, None, is_change=True)
        assert connect({"data": tmp_path / "other"}, None, is_change=True).address == ""
        assert connect({"registry": "127.0.0.1:1"}, None, is_change=True).address == "127.0.0.1:1"


def test_the_console_needs_to_know_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path / "share"), "XDG_STATE_HOME": str(tmp_path / "state")}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with noted(start(tmp_path / "other"), environ):
        start(tmp_path / "share" / "updraft")
        ended = CliRunner().invoke(cli, ["ui", "--no-browser"])
    assert (ended.exit_code, ended.output.partition(";")[0]) == (1, "Error: 2 stacks run on this machine")


def test_processes_of_a_stack_tell_nothing_about_another_registry(tmp_path: Path) -> None:
    data = start(tmp_path / "data", registry_address="127.0.0.1:2", processes=[PROCESS])
    assert connect({"data": data}, None).local().processes == (PROCESS,)
    assert connect({"data": data}, None).local().speculator == "default"
    assert connect({"data": data, "registry": "127.0.0.1:1"}, None).local().processes == ()


PROCESS = ProcessState(name="registry", state="ready", pid=1, restarts=0, address="127.0.0.1:2", log="")


def _commands(group: click.Group) -> Iterator[Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from _commands(command)
        elif isinstance(command, Command):
            yield command


@pytest.mark.parametrize("group", [draft.group(is_registry=True), rollout], ids=["draft", "rollout"])
def test_commands_that_change_something_say_so(group: click.Group) -> None:
    for command in _commands(group):
        assert (command.name in LOOKS) != bool({"decision", "change"} & set(command.needs)), command.name

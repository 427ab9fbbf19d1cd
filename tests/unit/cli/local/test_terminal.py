import io
from pathlib import Path

import pytest
from rich.console import Console

from updraft_cli.local.process import Changed, Event, Line, Process, State
from updraft_cli.local.terminal import Terminal


def printed(*events: Event) -> str:
    console = Console(file=io.StringIO(), width=200)
    terminal = Terminal(console)
    for event in events:
        terminal.listen(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        pytest.param(
            "12:30:05 INFO    trainer: Published  version=2",
            "trainer   | 12:30:05 Published  version=2\n",
            id="what the prefix says already is left out",
        ),
        pytest.param(
            "12:30:05 WARNING trainer: Redis is away",
            "trainer   | 12:30:05 WARNING: Redis is away\n",
            id="what is not normal keeps its level",
        ),
        pytest.param(
            "UPDRAFT_TRAINER_MODEL: required, but not set",
            "trainer   | UPDRAFT_TRAINER_MODEL: required, but not set\n",
            id="other lines are shown as they are",
        ),
        pytest.param("[bold]not markup", "trainer   | [bold]not markup\n", id="a log is not markup"),
        pytest.param("", "", id="empty lines are left out"),
    ],
)
def test_a_line_is_shown_without_what_a_person_knows(written: str, shown: str) -> None:
    assert printed(Line(process=process("trainer"), text=written)) == shown


def test_redis_is_shown_only_when_its_state_changes() -> None:
    redis = process("redis")
    ended = Changed(process=redis, state=State.RESTARTING, reason="was killed by SIGKILL", after_s=0.5)
    output = printed(Line(process=redis, text="1:M * Ready to accept connections"), ended)
    assert output == "redis     | was killed by SIGKILL; restarting in 0.5 s\n"


def test_ready_tells_how_long_it_took_and_where_it_is() -> None:
    ready = Changed(process=process("registry", address="127.0.0.1:50051"), state=State.READY, after_s=1.26)
    assert printed(ready) == "registry  | ready in 1.3 s at 127.0.0.1:50051\n"


def test_the_address_of_the_console_with_its_token_is_printed_only_to_a_terminal(tmp_path: Path) -> None:
    def pointed(*, is_terminal: bool) -> str:
        console = Console(file=io.StringIO(), width=200, force_terminal=is_terminal, color_system=None)
        Terminal(console).point_to_console(tmp_path, "http://127.0.0.1:1/?token=secret")
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert pointed(is_terminal=True) == "The console: http://127.0.0.1:1/?token=secret\n"
    assert pointed(is_terminal=False) == f"The console: run `updraft ui --data {tmp_path}`\n"


def test_a_closed_terminal_is_no_error() -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    terminal = Terminal(Console(file=Closed()))
    for _ in range(2):
        terminal.listen(Changed(process=process("redis"), state=State.STARTING))


def process(name: str, *, address: str = "") -> Process:
    return Process(name=name, command=("true",), is_ready=lambda: True, address=address)

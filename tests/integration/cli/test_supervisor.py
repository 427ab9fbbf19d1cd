"""The supervisor with small real programs instead of ours."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.processes import is_alive
from tests.support.wait import LONG_S, wait_until

from updraft_chassis.errors import NotFound, Unavailable
from updraft_cli.local.process import Changed, Event, Line, Process, State
from updraft_cli.local.supervisor import Supervisor

_SERVE = """
import pathlib, signal, sys, time
print("hello from", sys.argv[1])
pathlib.Path(sys.argv[1]).touch()
signal.pause()
"""

_STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + _SERVE

_SUPERVISE = """
import pathlib, sys, threading
from updraft_cli.local.process import Process
from updraft_cli.local.supervisor import Supervisor
folder = pathlib.Path(sys.argv[1])
ready = folder / "ready"
command = (sys.executable, "-c", sys.argv[2], str(ready))
process = Process(name="child", command=command, is_ready=ready.exists)
with Supervisor([[process]], logs=folder, listener=lambda event: None) as supervisor:
    print(supervisor.child("child").pid, flush=True)
    threading.Event().wait()
"""


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def supervise(tmp_path: Path, events: list[Event]) -> Callable[..., Supervisor]:
    def make(*stages: list[Process]) -> Supervisor:
        return Supervisor(stages, logs=tmp_path, listener=events.append, seed=1)

    return make


def test_a_stage_starts_when_the_one_before_is_ready_and_ends_before_it(
    supervise: Callable[..., Supervisor], events: list[Event], tmp_path: Path
) -> None:
    with supervise([serving("first", tmp_path)], [serving("second", tmp_path)]):
        pass
    seen = [(e.process.name, e.state) for e in events if isinstance(e, Changed)]
    assert seen == [
        ("first", State.STARTING),
        ("first", State.READY),
        ("second", State.STARTING),
        ("second", State.READY),
        ("second", State.STOPPING),
        ("second", State.STOPPED),
        ("first", State.STOPPING),
        ("first", State.STOPPED),
    ]


def test_what_a_child_writes_is_heard_and_kept(
    supervise: Callable[..., Supervisor], events: list[Event], tmp_path: Path
) -> None:
    with supervise([serving("first", tmp_path)]):
        wait_until(lambda: any(isinstance(event, Line) for event in events))
    (line,) = (event for event in events if isinstance(event, Line))
    assert line.text == f"hello from {tmp_path / 'first.ready'}"
    assert (tmp_path / "first.log").read_text() == f"{line.text}\n"


def test_a_child_that_is_killed_starts_again_and_the_others_go_on(
    supervise: Callable[..., Supervisor], events: list[Event], tmp_path: Path
) -> None:
    with supervise([serving("first", tmp_path)], [serving("second", tmp_path)]) as supervisor:
        before = [child.pid for child in supervisor.children]
        supervisor.crash("second")
        after = [child.pid for child in supervisor.children]
        assert supervisor.child("second").num_restarts == 1
    assert before[0] == after[0]
    assert before[1] != after[1]
    (told,) = (e for e in events if isinstance(e, Changed) and e.state is State.RESTARTING)
    assert told.reason == "was killed by SIGKILL"


def test_a_child_that_ends_while_starting_is_an_error_with_its_last_words(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    failing = program("failing", "print('port 1 is taken'); raise SystemExit(2)", lambda: False)
    supervisor = supervise([serving("first", tmp_path)], [serving("second", tmp_path), failing])
    with pytest.raises(
        Unavailable, match=r"failing exited with code 2; its last lines:\n  port 1 is taken\n"
    ) as raised:
        supervisor.start()
    assert str(tmp_path / "failing.log") in str(raised.value)
    assert [child.state for child in supervisor.children] == [State.STOPPED, State.STOPPED, State.FAILED]
    assert [child.pid for child in supervisor.children] == [None, None, None]


def test_a_child_that_never_gets_ready_is_an_error(supervise: Callable[..., Supervisor]) -> None:
    slow = program("slow", "import signal; signal.pause()", lambda: False, start_within_s=0.3)
    with pytest.raises(Unavailable, match=r"slow was not ready in 0\.3 s"):
        supervise([slow]).start()


def test_a_command_that_does_not_exist_is_told(supervise: Callable[..., Supervisor]) -> None:
    missing = Process(name="missing", command=("/no/such/program",), is_ready=lambda: False)
    with pytest.raises(Unavailable, match="cannot run /no/such/program: No such file"):
        supervise([missing]).start()


def test_a_child_that_ignores_sigterm_is_killed_after_its_time(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    ready = tmp_path / "stubborn.ready"
    stubborn = program("stubborn", _STUBBORN, ready.exists, str(ready), stop_within_s=0.3)
    with supervise([stubborn]) as supervisor:
        pid = supervisor.child("stubborn").pid
    assert pid is not None
    assert not is_alive(pid)


def test_kill_cuts_a_drain_short(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    ready = tmp_path / "stubborn.ready"
    stubborn = program("stubborn", _STUBBORN, ready.exists, str(ready), stop_within_s=60.0)
    supervisor = supervise([stubborn])
    supervisor.start()
    stopping = threading.Thread(target=supervisor.stop)
    stopping.start()
    wait_until(lambda: supervisor.child("stubborn").state is State.STOPPING)
    supervisor.kill()
    stopping.join(timeout=LONG_S / 2)  # less than what it may take without the kill
    assert not stopping.is_alive()


def test_an_unknown_child_is_told_with_those_that_exist(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no process redis; there are first"):
        supervise([serving("first", tmp_path)]).child("redis")


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SUPERVISE, str(tmp_path), _SERVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        child = int(supervisor.stdout.readline())
        assert is_alive(child)
        supervisor.kill()
    wait_until(lambda: not is_alive(child), what="the end of the child")


def test_ctrl_c_of_the_terminal_does_not_reach_the_children(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    with supervise([serving("first", tmp_path)]) as supervisor:
        pid = supervisor.child("first").pid
        assert pid is not None
        assert os.getpgid(pid) != os.getpgid(0)


def test_a_child_can_be_stopped_by_an_accident_that_it_survives(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    with supervise([serving("first", tmp_path)]) as supervisor:
        child = supervisor.child("first")
        before = child.pid
        child.crash(signal.SIGCONT)
        assert child.pid == before
        assert child.state is State.READY


def serving(name: str, folder: Path) -> Process:
    ready = folder / f"{name}.ready"
    return program(name, _SERVE, ready.exists, str(ready))


def program(
    name: str,
    code: str,
    is_ready: Callable[[], bool],
    *arguments: str,
    start_within_s: float = LONG_S,
    stop_within_s: float = 5.0,
) -> Process:
    return Process(
        name=name,
        command=(sys.executable, "-uc", code, *arguments),
        is_ready=is_ready,
        start_within_s=start_within_s,
        stop_within_s=stop_within_s,
    )

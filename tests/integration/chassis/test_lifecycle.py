import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.wait import LONG_S, wait_until

PREAMBLE = """
import asyncio, sys
from updraft_chassis import lifecycle, logs
from updraft_chassis.errors import UpdraftError, Unavailable
logs.configure(process="proc", format="text")
"""


class Process:
    """A Python process that runs `body` (which defines `main`) under `lifecycle.run`."""

    def __init__(self, body: str, log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{PREAMBLE}{body}\nlifecycle.run('proc', main)\nprint('returned')"],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def output(self) -> str:
        return self._log.read_text()

    def when_it_says(self, text: str) -> "Process":
        wait_until(lambda: text in self.output(), what=f"{text!r} in the output")
        return self

    def send(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def end(self) -> int:
        return self._process.wait(timeout=LONG_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    """Start processes that do not outlive the test."""
    with ExitStack() as stack:

        def start(body: str) -> Process:
            process = Process(body, tmp_path / "log")
            stack.callback(process.kill)
            return process

        yield start


Start = Callable[[str], Process]

DRAINING = """
async def main(stop):
    print("serving", flush=True)
    await stop.wait()
    print("drained", flush=True)
"""

STUCK = """
async def main(stop):
    print("serving", flush=True)
    await stop.wait()
    print("draining", flush=True)
    while True: pass  # not even the event loop runs any more
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_process_drain_and_exit_zero(signum: signal.Signals, start: Start) -> None:
    process = start(DRAINING).when_it_says("serving")
    process.send(signum)
    assert process.end() == 0
    assert "drained\nreturned" in process.output()
    assert "Traceback" not in process.output()


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)],
)
def test_a_second_signal_ends_even_a_stuck_process_at_once(
    first: signal.Signals, second: signal.Signals, start: Start
) -> None:
    process = start(STUCK).when_it_says("serving")
    process.send(first)
    process.when_it_says("draining").send(second)
    assert process.end() == -second
    assert "Traceback" not in process.output()


def test_a_failed_start_is_one_sentence_and_exit_one(start: Start) -> None:
    process = start("""
async def main(stop):
    raise UpdraftError("port 1 is taken")
""")
    assert process.end() == 1
    assert process.output() == "proc: port 1 is taken\n"


def test_a_bug_is_logged_once_with_its_traceback_and_exits_one(start: Start) -> None:
    process = start("""
async def main(stop):
    raise KeyError("lost")
""")
    assert process.end() == 1
    assert process.output().count("KeyError: 'lost'") == 1
    assert "CRITICAL proc: proc failed" in process.output()


def test_a_dead_child_ends_the_process_and_is_logged_once(start: Start) -> None:
    process = start("""
async def die():
    raise KeyError("lost")
async def main(stop):
    async with asyncio.TaskGroup() as group:
        group.create_task(die())
        group.create_task(asyncio.sleep(3600))
""")
    assert process.end() == 1
    assert process.output().count("KeyError: 'lost'") == 1
    assert "ExceptionGroup" not in process.output()


def test_children_that_fail_with_a_sentence_leave_no_traceback(start: Start) -> None:
    process = start("""
async def die(text):
    raise Unavailable(text)
async def main(stop):
    async with asyncio.TaskGroup() as group:
        group.create_task(die("Redis is away"))
        group.create_task(die("the registry is away"))
""")
    assert process.end() == 1
    assert "Redis is away" in process.output()
    assert "the registry is away" in process.output()
    assert "Traceback" not in process.output()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_a_signal_kills_does_not_look_done(signum: signal.Signals, start: Start) -> None:
    process = start("""
lifecycle.while_importing()
lifecycle.let_signals_kill()
print("working", flush=True)
import time
time.sleep(3600)
""").when_it_says("working")
    process.send(signum)
    assert process.end() == -signum
    assert process.output() == "working\n"


def test_waiting_for_the_stop_is_a_sleep_that_can_end_early(start: Start) -> None:
    process = start("""
async def main(stop):
    print(await stop.wait(0.01), stop.requested, flush=True)
    stop.request()
    print(await stop.wait(3600), stop.requested, flush=True)
""")
    assert process.end() == 0
    assert process.output() == "False False\nTrue True\nreturned\n"


FROZEN = """
import gc
async def main(stop):
    print("before:", gc.get_freeze_count() > len(gc.get_objects()), flush=True)
"""


def test_what_was_imported_costs_garbage_collection_nothing(start: Start) -> None:
    process = start(FROZEN)
    assert process.end() == 0
    assert "before: True" in process.output()

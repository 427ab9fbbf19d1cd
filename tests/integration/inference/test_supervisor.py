"""A child that behaves as SGLang's main process does, and ones that do not. `python -m sglang.launch_server` is theirs."""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tests.support.ports import free_port
from tests.support.wait import until, wait_until

from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_inference.launch.supervisor import ServerCommand, supervised, until_up
from updraft_inference.sidecar.started import health
from updraft_inference.tap.server_kind import SGLANG

OBEDIENT = """
import http.server, os, signal, subprocess, sys
port, folder, *more = sys.argv[1:]
def end(*_):
    open(f"{folder}/drained", "w").close()
    child.kill()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Ping(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
print("serving", *more, flush=True)
print("ValueError: not so good", flush=True)
http.server.HTTPServer(("127.0.0.1", int(port)), Ping).serve_forever()
"""

DEAF = OBEDIENT.replace("signal.signal(signal.SIGTERM, end)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")

BROKEN = """
print("out of memory", flush=True)
raise SystemExit(3)
"""


def launch(folder: Path, program: str, port: int, *, drain_s: float = 30.0) -> ServerCommand:
    package = folder / "sglang"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(program)
    return ServerCommand(
        kind=SGLANG,
        python=Path(sys.executable),
        arguments=[str(port), str(folder)],
        environment={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)},
        drain_s=drain_s,
    )


def is_up(port: int) -> Callable[[], Awaitable[bool]]:
    return health(f"http://127.0.0.1:{port}{SGLANG.health}")


async def test_it_is_waited_for_told_of_drained_and_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    caplog.set_level(logging.INFO)
    async with supervised(launch(tmp_path, OBEDIENT, port)) as supervisor:
        await supervisor.ready(is_up(port), lambda: False)
        process = psutil.Process(supervisor.pid)
        family = [process, *process.children(recursive=True)]
        assert not supervisor.has_ended
        await supervisor.restart([str(port), str(tmp_path), "again"])
        await supervisor.ready(is_up(port), lambda: False)
        assert supervisor.pid != process.pid
        family.append(psutil.Process(supervisor.pid))
        await until(lambda: "serving again" in caplog.messages, what="its line")

    assert (tmp_path / "drained").exists()
    assert not psutil.wait_procs(family, timeout=30)[1]
    levels = {record.message: record.levelname for record in caplog.records if record.name == "sglang"}
    assert levels["serving"] == "INFO"
    assert levels["ValueError: not so good"] == "WARNING"


async def test_a_stop_during_a_restart_leaves_no_server(tmp_path: Path) -> None:
    port = free_port()
    async with supervised(launch(tmp_path, OBEDIENT, port)) as supervisor:
        await supervisor.ready(is_up(port), lambda: False)
        before = supervisor.pid
        async with asyncio.TaskGroup() as tasks:
            restarting = tasks.create_task(_refused(supervisor.restart([str(port), str(tmp_path), "again"])))
            await asyncio.sleep(0)  # the restart waits for the server's end
            await supervisor.stop()

        assert "does not start again" in restarting.result()
        assert supervisor.has_ended
        assert supervisor.pid == before, "no other server was started"
        assert "does not start again" in await _refused(supervisor.restart([])), "nor is one later"


async def _refused(restart: Awaitable[None]) -> str:
    with pytest.raises(Unavailable) as refused:
        await restart
    return str(refused.value)


async def test_one_that_does_not_end_is_killed_with_all_its_processes(tmp_path: Path) -> None:
    port = free_port()
    async with supervised(launch(tmp_path, DEAF, port, drain_s=0.2)) as supervisor:
        await supervisor.ready(is_up(port), lambda: False)
        process = psutil.Process(supervisor.pid)
        family = [process, *process.children(recursive=True)]
        assert len(family) == 2

    assert not psutil.wait_procs(family, timeout=30)[1]


async def test_one_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(ExceptionGroup) as raised:
        async with supervised(launch(tmp_path, BROKEN, port)) as supervisor:
            await supervisor.ready(is_up(port), lambda: False)

    assert raised.group_contains(Unavailable, match=r"(?s)status 3.*out of memory")


async def test_an_interpreter_that_is_not_there_is_told(tmp_path: Path) -> None:
    plan = launch(tmp_path, BROKEN, 1)
    missing = replace(plan, python=tmp_path / "none")

    with pytest.raises(ExceptionGroup) as raised:
        async with supervised(missing):
            pass

    assert raised.group_contains(InvalidInput, match="UPDRAFT_INFERENCE_SGLANG_PYTHON")


async def test_who_is_told_to_stop_does_not_wait_for_a_server() -> None:
    with pytest.raises(Unavailable, match="stopped before"):
        await until_up("SGLang", is_up(free_port()), is_stopped=lambda: True)


def test_the_server_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    port = free_port()
    plan = launch(tmp_path, OBEDIENT, port)
    command = (str(plan.python), plan.arguments, dict(plan.environment))
    program = f"""
import asyncio
from pathlib import Path
from updraft_inference.tap.server_kind import SGLANG
from updraft_inference.launch.supervisor import ServerCommand, supervised
python, arguments, environment = {command!r}
async def main():
    launch = ServerCommand(kind=SGLANG, python=Path(python), arguments=arguments, environment=environment, drain_s=5)
    async with supervised(launch) as supervisor:
        print(supervisor.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: len(server.children()) == 1, what="the server's start")
        parent.kill()
        wait_until((tmp_path / "drained").exists, what="the server's own end")
    psutil.wait_procs([server], timeout=30)

"""The whole of local mode, with a tiny model."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from redis import Redis
from tests.integration.cli.conftest import Run
from tests.support.console import Browser
from tests.support.processes import is_alive
from tests.support.redis_server import RedisServer
from tests.support.wait import LONG_S, wait_until

from updraft_chassis.errors import Conflict, InvalidInput, Unavailable
from updraft_cli.local.plan import StackConfig
from updraft_cli.local.process import Event, State
from updraft_cli.local.stack import Stack

pytestmark = pytest.mark.lasts(80)

_SMALL = {"UPDRAFT_INFERENCE_MAX_CONTEXT": "512", "UPDRAFT_INFERENCE_DTYPE": "float32"}


@pytest.fixture(scope="module")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that several tests share: they only look, or kill what starts again."""
    with Stack(config(tmp_path_factory.mktemp("stack"), tiny_model)) as running:
        yield running


def test_a_ready_stack_answers(stack: Stack) -> None:
    assert [child.process.name for child in stack.children] == ["redis", "registry", "trainer", "inference"]
    assert answer(stack)["usage"]["completion_tokens"] == 8


def test_status_shows_every_process_and_what_was_served(stack: Stack, run: Run) -> None:
    answer(stack)
    status = json.loads(run("status", "-o", "json", "--data", stack.folder.path).output)
    processes = {process["name"]: process for process in status["processes"]}
    assert {name: process["state"] for name, process in processes.items()} == dict.fromkeys(
        ("redis", "registry", "trainer", "inference"), "ready"
    )
    assert processes["inference"]["pid"] == stack.child("inference").pid
    assert status["serving"]["output_tokens"] >= 8
    assert status["training"]["optimizer_steps"] >= 0
    table = run("status", "--data", stack.folder.path).output
    assert re.search(r"inference +ready +\d+ +http://127\.0\.0\.1:\d+", table)


def test_draft_commands_find_the_registry_of_the_stack(stack: Stack, run: Run) -> None:
    result = run("draft", "list", "--data", stack.folder.path)
    assert result.exit_code == 0
    assert result.output.startswith("No drafts of default yet.")


def test_captured_requests_reach_redis_and_survive_its_death(stack: Stack) -> None:
    answer(stack)
    with Redis.from_url(stack.addresses.redis_url) as client:
        wait_until(lambda: "samples" in str(client.keys("updraft:*")), what="a trace in Redis")
        client.set("kept", "value")
        wait_until(lambda: _is_on_disk(client), what="the value on disk")
    stack.crash("redis")
    with Redis.from_url(stack.addresses.redis_url) as client:
        assert client.get("kept") == b"value"


@pytest.mark.parametrize("name", ["registry", "trainer"])
def test_serving_goes_on_while_another_process_is_killed_and_starts_again(stack: Stack, name: str) -> None:
    before = stack.child("inference").pid
    stack.crash(name)
    assert answer(stack)["usage"]["completion_tokens"] == 8
    assert stack.child("inference").pid == before
    assert stack.child(name).state is State.READY


def test_a_second_stack_on_the_folder_is_refused(stack: Stack) -> None:
    with pytest.raises(Conflict, match=r"another updraft \(pid \d+\) runs on"), Stack(stack.config):
        pass


def test_a_taken_port_is_one_sentence_and_nothing_is_left(stack: Stack, tiny_model: Path, tmp_path: Path) -> None:
    taken = stack.addresses.port
    events: list[Event] = []
    second = Stack(config(tmp_path, tiny_model, port=taken), listener=events.append)
    with pytest.raises(Conflict, match=rf"port {taken} on 127\.0\.0\.1 is taken by .*; choose another with --port"):
        second.__enter__()
    assert events == []


def test_a_wrong_setting_is_the_processs_own_sentence(tiny_model: Path, tmp_path: Path) -> None:
    wrong = {"UPDRAFT_REGISTRY_GATE_CONFIDENCE": "2"}
    with (
        pytest.raises(
            Unavailable, match=r"registry exited with code 2; its last lines:\n  UPDRAFT_REGISTRY_GATE_CONFIDENCE: "
        ),
        Stack(config(tmp_path, tiny_model, settings=wrong)),
    ):
        pass


def test_a_setting_of_nobody_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="UPDRAFT_PORT is not a setting"):
        Stack(config(tmp_path, tiny_model, settings={"UPDRAFT_PORT": "1"})).__enter__()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no model folder .* no config\.json"):
        Stack(config(tmp_path / "data", tmp_path)).__enter__()


def test_a_redis_that_is_not_there_is_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    away = config(tmp_path, tiny_model, redis_url=f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(Unavailable, match="no Redis answers at the address of --redis-url"):
        Stack(away).__enter__()


def test_a_stack_can_use_another_redis_and_do_without_a_trainer(
    tiny_model: Path, tmp_path: Path, redis_server: RedisServer
) -> None:
    other = config(tmp_path, tiny_model, redis_url=redis_server.url, trainer=False)
    with Stack(other) as running, Redis.from_url(redis_server.url) as client:
        assert [child.process.name for child in running.children] == ["registry", "inference"]
        answer(running)
        wait_until(lambda: bool(client.keys("updraft:*")), what="a trace in the other Redis")


class TestUp:
    """`updraft up` as a person has it: a process in a terminal."""

    def test_ctrl_c_stops_everything_and_exits_0(self, tiny_model: Path, tmp_path: Path) -> None:
        with up(tmp_path, tiny_model) as process:
            children = ready(process, tmp_path)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=LONG_S)
        assert process.returncode == 0
        assert "Everything has stopped. The data is kept." in output
        assert not any(map(is_alive, children))
        assert not (tmp_path / "state.json").exists()

    def test_a_second_ctrl_c_does_not_wait_for_a_process_that_cannot_end(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        with up(tmp_path, tiny_model) as process:
            children = ready(process, tmp_path)
            hanging = psutil.Process(children[-1])
            hanging.suspend()
            process.send_signal(signal.SIGINT)
            wait_until(lambda: '"stopping"' in (tmp_path / "state.json").read_text())
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=LONG_S)
        assert process.returncode == 0
        assert not any(map(is_alive, children))

    def test_status_and_the_console_find_all_of_a_stack_on_another_data_folder(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        with up(tmp_path, tiny_model) as process:
            ready(process, tmp_path)
            assert process.stdout is not None
            printed = next(line.strip() for line in process.stdout if "updraft status" in line)
            command = [sys.executable, "-m", "updraft_cli", "status"]
            status = subprocess.run(command, env=elsewhere(tmp_path), capture_output=True, text=True, check=True).stdout
            pointer = next(line.strip() for line in process.stdout if line.startswith("The console: "))
            shown = [sys.executable, "-m", "updraft_cli", "ui", "--no-browser", "--data", str(tmp_path)]
            with subprocess.Popen(shown, stdout=subprocess.PIPE, env=elsewhere(tmp_path), text=True) as console:
                assert console.stdout is not None
                with Browser(console.stdout.readline().strip()) as browser:
                    overview, traffic = browser.text("/"), browser.text("/s/default/traffic")
                console.terminate()
        assert pointer == f"The console: run `updraft ui --data {tmp_path}`"
        assert printed == f"updraft status --data {tmp_path}"
        assert "does not answer" not in status
        for part in ("trainer    ready", "tokens so far", "optimizer steps since its start"):
            assert part in status
        assert "trainer ready 0" in overview
        assert "The pod on this machine holds no draft" in traffic

    def test_ctrl_c_while_starting_stops_what_was_started(self, tiny_model: Path, tmp_path: Path) -> None:
        with up(tmp_path, tiny_model) as process:
            assert process.stdout is not None
            assert "starting" in process.stdout.readline()
            started = [child["pid"] for child in json.loads((tmp_path / "state.json").read_text())["processes"]]
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=LONG_S)
        assert process.returncode == 0
        assert "Everything has stopped" in output
        assert not any(is_alive(pid) for pid in started if pid)

    def test_a_killed_stack_leaves_no_process_and_the_next_one_goes_on(self, tiny_model: Path, tmp_path: Path) -> None:
        with up(tmp_path, tiny_model) as process:
            children = ready(process, tmp_path)
            url = json.loads((tmp_path / "state.json").read_text())["redis_url"]
            with Redis.from_url(url) as client:
                client.set("kept", "value")
            port = console_port(process)
            process.kill()
            process.communicate()
        wait_until(lambda: not any(map(is_alive, children)), what="the end of the children")
        wait_until(lambda: not is_listening(port), what="the end of the console")
        with Stack(config(tmp_path, tiny_model)) as running, Redis.from_url(running.addresses.redis_url) as client:
            assert client.get("kept") == b"value"
            assert answer(running)["usage"]["completion_tokens"] == 8


def config(data: Path, model: Path, **changes: object) -> StackConfig:
    values: dict[str, object] = {"port": 0, "registry_port": 0, "threads": 1, "settings": _SMALL} | changes
    return StackConfig(data=data, model=model, **values)  # type: ignore[arg-type] # keyword by keyword, on purpose


def answer(stack: Stack) -> dict[str, dict[str, int]]:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": True}
    response = httpx.post(f"{stack.addresses.inference_url}/v1/completions", json=body, timeout=LONG_S)
    answered: dict[str, dict[str, int]] = response.raise_for_status().json()
    return answered


@contextmanager
def up(data: Path, model: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `updraft up`; what still runs at the end of the block is killed, and its children with it."""
    settings = [part for name, value in _SMALL.items() for part in ("--set", f"{name}={value}")]
    options = ["--port", "0", "--registry-port", "0", "--threads", "1", *settings]
    command = [sys.executable, "-m", "updraft_cli", "up", *options, "--model", str(model), "--data", str(data)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, env=elsewhere(data), text=True) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def elsewhere(data: Path) -> dict[str, str]:
    """An environment without a stack on the default data folder, whose notes are in the test's folder."""
    ours = {"XDG_STATE_HOME": str(data / "notes"), "XDG_DATA_HOME": str(data / "nothing")}
    return {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")} | ours


def ready(process: subprocess.Popen[str], data: Path) -> list[int]:
    """Read until the stack is ready; return the pids of its processes."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ready."):
            state = json.loads((data / "state.json").read_text())
            return [child["pid"] for child in state["processes"]]
    raise AssertionError("".join(lines))


def console_port(process: subprocess.Popen[str]) -> int:
    """The port of the console beside a stack, once it listens."""
    ports = list[int]()

    def found() -> bool:
        consoles = [child for child in psutil.Process(process.pid).children() if "ui" in child.cmdline()]
        connections = (one for console in consoles for one in console.net_connections())
        ports.extend(one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN)
        return bool(ports)

    wait_until(found, what="the console listens")
    assert is_listening(ports[0])
    return ports[0]


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _is_on_disk(client: Redis) -> bool:
    """Redis writes its log once a second; what it has not written is what a kill may cost."""
    info = client.info("persistence")
    return int(info["aof_buffer_length"]) == 0 and int(info["aof_pending_bio_fsync"]) == 0

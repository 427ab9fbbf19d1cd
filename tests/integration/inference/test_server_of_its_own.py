"""`updraft-inference --engine vllm` that starts its server, whose place a program takes that answers and ends as vLLM does."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from tests.support.ports import free_port
from tests.support.processes import process_group
from tests.support.tiny_target import make_tiny_target
from tests.support.wait import wait_until

UP = "The vLLM server is up"
SERVER = """
import argparse, http.server, os, signal, sys
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
port = parser.parse_known_args()[0].port
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/crash":
            print("RuntimeError: out of memory", flush=True)
            os._exit(3)
    def log_message(self, *_):
        pass
def end(*_):
    print("drained", os.environ["UPDRAFT_VLLM_SOCKET"], flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
http.server.HTTPServer(("127.0.0.1", port), Server).serve_forever()
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture
def environment(target: Path, short_tmp_path: Path) -> dict[str, str]:
    """The process's variables; the package vLLM is the program above."""
    packages = short_tmp_path / "packages"
    folder = packages / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    (folder / "api_server.py").write_text(SERVER)
    (packages / "vllm-0.32.0.dist-info").mkdir()
    (packages / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    settings = {
        "MODEL": str(target),
        "ENGINE": "vllm",
        "VLLM_PYTHON": sys.executable,
        "PORT": str(free_port()),
        "METRICS_PORT": "0",
        "DATA_DIR": str(short_tmp_path / "data"),
        "DRAFT_VOCAB_SIZE": "64",
        "LOG_FORMAT": "text",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")}
    prefixed = {f"UPDRAFT_INFERENCE_{name}": value for name, value in settings.items()}
    return {**inherited, **prefixed, "PYTHONPATH": str(packages)}


@contextmanager
def started(environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, once its server answers."""
    command = [sys.executable, "-m", "updraft_inference"]
    with process_group(command, log, environment=environment) as process:
        wait_until(lambda: UP in log.read_text() or process.poll() is not None, what="the server's start")
        assert process.poll() is None, log.read_text()
        yield process


def ended(environment: dict[str, str]) -> str:
    """The sentence with which the process ends at its start."""
    done = subprocess.run(
        [sys.executable, "-m", "updraft_inference"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_server_ends_first_and_in_order(environment: dict[str, str], short_tmp_path: Path) -> None:
    with started(environment, log := short_tmp_path / "log") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0

    assert f"drained {short_tmp_path}/data/vllm.sock" in log.read_text()


def test_the_process_ends_with_the_last_words_of_its_server(environment: dict[str, str], short_tmp_path: Path) -> None:
    with started(environment, log := short_tmp_path / "log") as process:
        with suppress(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{environment['UPDRAFT_INFERENCE_PORT']}/crash")
        assert process.wait(120) == 1

    *_, last = log.read_text().split("updraft-inference: ")
    assert "the vLLM server ended with status 3; its last lines:" in last
    assert "RuntimeError: out of memory" in last


def test_an_environment_without_vllm_is_told(environment: dict[str, str]) -> None:
    assert "has no vLLM: install it there" in ended({**environment, "PYTHONPATH": ""})


def test_a_port_that_is_taken_is_told_before_anything_starts(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", int(environment["UPDRAFT_INFERENCE_PORT"]))):
        assert "is taken; choose another with UPDRAFT_INFERENCE_PORT" in ended(environment)

"""The process as an operator meets it: it starts, drains on SIGTERM, and says in a sentence why it cannot start."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.support.ports import free_port
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.wait import LONG_S, wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(write_tokenizer(tmp_path_factory.mktemp("models") / "tiny"))


@contextmanager
def process(folder: Path, **values: object) -> Iterator["subprocess.Popen[str]"]:
    """`updraft-inference` with these settings."""
    settings = {"data_dir": folder / "data", "num_threads": 1, "max_context": 512, "dtype": "float32", **values}
    environ = {f"UPDRAFT_INFERENCE_{name.upper()}": str(value) for name, value in settings.items()}
    with subprocess.Popen(
        [sys.executable, "-m", "updraft_inference"],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def test_sigterm_lets_a_running_stream_end_and_exits_0(model: Path, tmp_path: Path) -> None:
    port = free_port()
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        process(tmp_path, model=model, port=port) as running,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as http,
    ):

        def is_ready() -> bool:
            try:
                return http.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, what="readiness")
        with http.stream("POST", "/v1/completions", json=body, timeout=LONG_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]

        assert rest[-1] == "data: [DONE]"
        assert running.wait(timeout=LONG_S) == 0
        assert running.stderr is not None
        logged = [json.loads(line) for line in running.stderr.read().splitlines()]
        assert {"Listening", "Ready"} <= {record["message"] for record in logged}
        assert not any("color_message" in record for record in logged), "uvicorn's second text of the same"


def test_a_taken_port_is_a_sentence(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process(tmp_path, model=model, port=port) as running:
            _, stderr = running.communicate(timeout=LONG_S)

    assert running.returncode == 1
    assert stderr.splitlines()[-1].startswith(f"updraft-inference: port {port} on 127.0.0.1 is taken")
    assert "UPDRAFT_INFERENCE_PORT" in stderr


def test_a_missing_model_is_a_sentence(tmp_path: Path) -> None:
    with process(tmp_path, model=tmp_path / "absent") as running:
        _, stderr = running.communicate(timeout=LONG_S)

    assert running.returncode == 1
    assert stderr.splitlines() == [f"updraft-inference: the model folder {tmp_path / 'absent'} has no tokenizer.json"]


def test_a_model_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    with process(tmp_path, model=write_tokenizer(tmp_path / "half"), port=free_port(), log_format="text") as running:
        _, stderr = running.communicate(timeout=LONG_S)

    assert running.returncode == 1
    assert "config.json does not exist" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


def test_bad_settings_are_all_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with process(tmp_path, port="http", num_slots=0) as running:
        _, stderr = running.communicate(timeout=LONG_S)

    assert running.returncode == 2
    assert {line.partition(":")[0] for line in stderr.splitlines()} == {
        "UPDRAFT_INFERENCE_MODEL",
        "UPDRAFT_INFERENCE_PORT",
        "UPDRAFT_INFERENCE_NUM_SLOTS",
    }

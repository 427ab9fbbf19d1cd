"""`updraft-trainer ranks` as a process: it ends with one sentence, which a condition of the operator quotes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from tests.support.ports import free_port
from tests.support.wait import wait_until


def _start(folder: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")}
    return subprocess.Popen(
        [sys.executable, "-m", "updraft_trainer", "ranks", *options, "--id", "test"],
        cwd=folder,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_ranks_that_cannot_start_are_tried_again_and_then_told_in_one_sentence(tmp_path: Path) -> None:
    ended = _start(
        tmp_path,
        "--nodes",
        "1",
        "--ranks-per-node",
        "2",
        "--endpoint",
        f"localhost:{free_port()}",
        "--max-restarts",
        "1",
    )

    _, said = ended.communicate(timeout=120)

    assert ended.returncode == 1
    assert _last_line(said).startswith("updraft-trainer: rank "), said[-2000:]
    assert "ended with status 2" in _last_line(said), "the status of settings that are missing"


def test_a_pod_that_the_others_do_not_reach_says_so(tmp_path: Path) -> None:
    host = "localhost"
    ended = _start(
        *(tmp_path, "--nodes", "2", "--ranks-per-node", "1"),
        *("--endpoint", f"{host}:{free_port()}", "--meeting-seconds", "2"),
    )

    _, said = ended.communicate(timeout=120)

    assert ended.returncode == 1
    assert f"the rendezvous of 2 pods at {host}" in _last_line(said), said[-2000:]
    assert "check that all of them run" in _last_line(said)


def test_a_pod_that_waits_ends_at_once_when_it_is_told_to(tmp_path: Path) -> None:
    port = free_port()
    waiting = _start(tmp_path, "--nodes", "2", "--ranks-per-node", "1", "--endpoint", f"localhost:{port}")
    try:
        wait_until(lambda: _listens(waiting.pid, port), what="a pod that waits for the other")

        waiting.send_signal(signal.SIGTERM)

        assert waiting.wait(timeout=60) == 0
    finally:
        waiting.kill()
        waiting.communicate()


def _listens(pid: int, port: int) -> bool:
    return any(
        each.status == psutil.CONN_LISTEN and each.laddr.port == port
        for each in psutil.Process(pid).net_connections(kind="tcp")
    )

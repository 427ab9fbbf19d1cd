"""`draft train --self-play` with a tiny model: from nothing to a version, interrupted and continued."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.integration.cli.conftest import Run
from tests.support.disk import file_size_limit
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.wait import wait_until

pytestmark = pytest.mark.lasts(60)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    variables = {
        "UPDRAFT_REGISTRY_DATA_DIR": str(tmp_path / "registry"),
        "UPDRAFT_REGISTRY_PORT": str(port),
        "UPDRAFT_REGISTRY_METRICS_PORT": "0",
        "UPDRAFT_REGISTRY_STRATEGY": "Immediate",  # as `updraft up` runs it
    }
    with Process("updraft_registry", variables, tmp_path / "registry.log") as process:
        process.wait_for_log("Registry serves")
        yield f"127.0.0.1:{port}"


def command(model: Path, output: Path, count: int) -> list[str]:
    words = ("draft", "train", str(model), "--self-play", str(count), "--output", str(output), "--threads", "1")
    return [sys.executable, "-m", "updraft_cli", *words]


def train(model: Path, output: Path, count: int = 24) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(model, output, count), capture_output=True, text=True, check=False, timeout=240)


def recorded(output: Path) -> dict[str, int]:
    """When each recording was made, by its file's name."""
    return {path.name: path.stat().st_mtime_ns for path in Path(f"{output}-recordings").glob("*.trace")}


def test_an_interrupted_run_goes_on_and_its_draft_is_the_first_version(
    tiny_model: Path, tmp_path: Path, registry: str, run: Run
) -> None:
    output = tmp_path / "day0"
    with subprocess.Popen(command(tiny_model, output, 200), stderr=subprocess.PIPE, text=True) as first:
        wait_until(lambda: len(recorded(output)) >= 3)
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert f"Recorded requests stay in {output}-recordings; the same command goes on from there." in errors
    assert "Traceback" not in errors
    before = recorded(output)

    done = train(tiny_model, output, 24)
    assert done.returncode == 0, done.stderr
    after = recorded(output)
    assert before.items() <= after.items(), "nothing was made again"
    assert len(after) >= 24
    assert "tokens per step, 1.00 with no draft (" in done.stdout

    imported = run("draft", "import", output, "--registry", registry, "--speculator", "s", "-o", "json")
    assert imported.exit_code == 0, imported.output
    assert json.loads(imported.stdout)["draft"]["version"] == 1
    shown = json.loads(run("draft", "show", "1", "--registry", registry, "--speculator", "s", "-o", "json").stdout)
    assert shown["draft"]["phase"] == "stable"
    assert shown["provenance"]["code_version"].startswith("self-play by updraft/")


def test_a_model_without_a_chat_template_is_told_in_a_sentence(tmp_path: Path) -> None:
    model = write_tokenizer(make_tiny_target(tmp_path / "model"), template=None)
    done = train(model, tmp_path / "day0")
    assert done.returncode == 1
    assert done.stderr == (f"updraft-inference: {model} has no chat template, so nothing shows how its prompts begin\n")


def test_a_full_disk_is_told_in_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    with file_size_limit(1000):
        done = train(tiny_model, tmp_path / "day0")
    assert done.returncode == 1
    full = f"the disk of {tmp_path}/day0-recordings is full: free some space"
    assert done.stderr.splitlines() == [
        "recording: 0 of 24",
        f"updraft-inference: {full}; the same command goes on with what is recorded",
    ]


def test_a_part_that_a_signal_ends_has_not_done_its_work(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "day0"
    with subprocess.Popen(command(tiny_model, output, 200), stderr=subprocess.PIPE, text=True) as train:
        wait_until(lambda: len(recorded(output)) >= 3)
        (engine,) = psutil.Process(train.pid).children()
        engine.send_signal(signal.SIGTERM)
        _, errors = train.communicate(timeout=60)
    assert train.returncode == 1
    assert errors.splitlines()[1:] == [
        "Error: inference was killed by SIGTERM; the same command goes on with what is recorded"
    ]
    assert not output.exists()

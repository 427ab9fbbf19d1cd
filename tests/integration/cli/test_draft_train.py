"""`draft train` with a tiny model: from nothing to a version by each source, interrupted and continued."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from google.protobuf import json_format
from tests.integration.cli.conftest import Run
from tests.support.disk import file_size_limit
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.traces import TraceMaker
from tests.support.wait import wait_until

from updraft.registry.v1 import registry_pb2
from updraft_draft import checkpoint, recordings
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import read_sample

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


def command(model: Path, output: Path, *source: object) -> list[str]:
    words = ("--target", model, *source, "--output", output, "--threads", 1)
    return [sys.executable, "-m", "updraft_cli", "draft", "train", *map(str, words)]


def train(model: Path, output: Path, *source: object) -> subprocess.CompletedProcess[str]:
    words = command(model, output, *(source or ("--self-play", 24)))
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=240)


def kill(process: subprocess.Popen[str]) -> None:
    """The whole family at once, as a power failure would."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait(timeout=60)


def manifest_of(output: Path) -> registry_pb2.Manifest:
    return json_format.Parse((output / "manifest.json").read_text(), registry_pb2.Manifest())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """32 prompts, one line that is none, and one that comes twice."""
    records: list[object] = [{"prompt": f"Question {n}"} for n in range(30)]
    records += [
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*records, records[0]]) + "no prompt\n")
    return path


def recorded(output: Path) -> dict[str, int]:
    """When each recording was made, by its file's name."""
    return {path.name: path.stat().st_mtime_ns for path in Path(f"{output}-recordings").glob("*.trace")}


def test_an_interrupted_run_goes_on_and_its_draft_is_the_first_version(
    tiny_model: Path, tmp_path: Path, registry: str, run: Run
) -> None:
    output = tmp_path / "day0"
    with subprocess.Popen(command(tiny_model, output, "--self-play", 200), stderr=subprocess.PIPE, text=True) as first:
        wait_until(lambda: len(recorded(output)) >= 3)
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "Stopped. The same command goes on from there." in errors
    assert "Traceback" not in errors
    before = recorded(output)

    done = train(tiny_model, output)
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
    assert shown["provenance"]["origin"] == "24 requests of self-play"


def test_a_draft_from_prompts_survives_kills_while_recording_and_while_training(
    tiny_model: Path, tmp_path: Path, prompts: Path
) -> None:
    output = tmp_path / "day0"
    source = ("--prompts", prompts, "--max-tokens", 32, "--epochs", 80)
    with subprocess.Popen(command(tiny_model, output, *source), stderr=subprocess.PIPE, text=True) as first:
        wait_until(lambda: len(recorded(output)) >= 3)
        kill(first)
    before = recorded(output)

    with subprocess.Popen(command(tiny_model, output, *source), stderr=subprocess.PIPE, text=True) as second:
        wait_until(lambda: bool(list(tmp_path.glob("day0-unfinished/*/states/state-*-*"))), timeout_s=120)
        kill(second)
    assert before.items() <= recorded(output).items(), "nothing was made again"
    assert len(recorded(output)) == 32
    assert not output.exists()

    done = train(tiny_model, output, *source)
    assert done.returncode == 0, done.stderr
    assert "32 prompts; left out: 1 repeated (first: line 33); 1 not JSON (first: line 34)." in done.stderr
    assert "Going on from step " in done.stderr
    assert "tokens per step, 1.00 with no draft (4 held-out requests" in done.stdout
    assert manifest_of(output).provenance.origin == "answers to questions.jsonl"
    assert manifest_of(output).provenance.samples == 28
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day0", "day0-recordings", "questions.jsonl"]


def test_a_draft_from_the_replay_of_a_trainer_is_a_folder_that_servers_load(tiny_model: Path, tmp_path: Path) -> None:
    traces, limits = TraceMaker(tiny_model), ReplayLimits.of(10 * 1024**2)
    with Replay.open(tmp_path / "data" / "replay", limits=limits, expected=traces.expected, cache_bytes=0) as replay:
        data = [traces.data(seed, evaluation=seed % 10 == 0) for seed in range(40)]
        replay.admit([IncomingTrace(sample=read_sample(one, traces.expected), data=one) for one in data])
    output = tmp_path / "day0"
    done = train(tiny_model, output, "--traces", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert manifest_of(output).provenance.origin == f"traces of {tmp_path}/data"
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert {"config.json", "model.safetensors"} <= {path.name for path in output.iterdir()}
    loaded, tensors = checkpoint.load(output)
    assert loaded.draft_vocab_size == len(tensors["d2t"])


def test_traces_of_another_target_are_refused_in_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tokenizer(make_tiny_target(tmp_path / "other", seed=7))
    recordings.write(tmp_path / "traces", "a", TraceMaker(other).trace(0))
    done = train(tiny_model, tmp_path / "day0", "--traces", tmp_path / "traces")
    assert done.returncode == 1
    reason = f"updraft-trainer: {tmp_path}/traces holds recordings of another model: name another folder, or remove it"
    assert reason in done.stderr.splitlines(), "beside progress, which another process shows"


def test_a_file_without_prompts_is_told_in_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "image.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    done = train(tiny_model, tmp_path / "day0", "--prompts", tmp_path / "image.jsonl")
    assert done.returncode == 1
    assert f"updraft-inference: {tmp_path}/image.jsonl holds no prompt to answer: 1 not UTF-8 text" in done.stderr


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
    with subprocess.Popen(command(tiny_model, output, "--self-play", 200), stderr=subprocess.PIPE, text=True) as train:
        wait_until(lambda: len(recorded(output)) >= 3)
        (engine,) = psutil.Process(train.pid).children()
        engine.send_signal(signal.SIGTERM)
        _, errors = train.communicate(timeout=60)
    assert train.returncode == 1
    assert errors.splitlines()[1:] == ["Error: inference was killed by SIGTERM; the same command goes on from there"]
    assert not output.exists()

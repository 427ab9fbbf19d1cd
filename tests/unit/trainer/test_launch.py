"""What torchrun is told on each pod, and the sentence with which it ends."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import run

from updraft_chassis import lifecycle
from updraft_chassis.errors import Unavailable
from updraft_trainer.launch import SHUTDOWN_S, Launch, last_words, main, rank

TWO = Launch(num_nodes=2, ranks_per_node=4, endpoint="qwen-trainer-0.qwen-trainer:29400", id="uid")


def test_torchrun_reads_its_arguments() -> None:
    given = run.parse_args(TWO.arguments("qwen-trainer-1"))  # type: ignore[no-untyped-call] # torch's

    config, _, command = run.config_from_args(given)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.run_id) == (2, 2, 4, "uid")
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "qwen-trainer-0.qwen-trainer:29400")
    assert config.max_restarts > 10, "each eviction of another pod costs one"
    assert (config.shutdown_timeout, config.local_addr) == (SHUTDOWN_S, None)
    assert command[-3:] == ["-m", "updraft_trainer", "rank"]


def test_others_reach_the_ranks_at_the_address_of_the_pod() -> None:
    arguments = replace(TWO, address="10.1.2.3").arguments("qwen-trainer-1")
    config, _, _ = run.config_from_args(run.parse_args(arguments))  # type: ignore[no-untyped-call] # torch's

    assert config.local_addr == "10.1.2.3"


def test_a_pod_on_the_network_of_its_host_has_the_name_that_the_operator_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(run, "parse_args", given.append)
    monkeypatch.setattr(run, "run", lambda _: None)
    monkeypatch.setenv("UPDRAFT_TRAINER_POD_NAME", "qwen-trainer-0")

    main(TWO)

    assert "is_host=true" in " ".join(given[0])


@pytest.mark.parametrize(
    ("launch", "hostname", "is_host"),
    [
        pytest.param(TWO, "qwen-trainer-0", "true", id="the first pod"),
        pytest.param(TWO, "qwen-trainer-1", "false", id="the second pod"),
        pytest.param(TWO, "qwen-trainer-01", "false", id="a longer name"),
        pytest.param(
            Launch(num_nodes=1, ranks_per_node=2, endpoint="localhost:29400", id="x"), "any", "true", id="localhost"
        ),
    ],
)
def test_the_first_pod_hosts_the_rendezvous_whatever_dns_says(launch: Launch, hostname: str, is_host: str) -> None:
    (option,) = (each for each in launch.arguments(hostname) if each.startswith("--rdzv-conf="))

    assert f"is_host={is_host}," in option


def _end(file: Path | None, error: Exception) -> None:
    """End as a rank does that meets this error."""
    with (
        last_words({"TORCHELASTIC_ERROR_FILE": str(file)} if file else {}),
        lifecycle.errors_as_sentences("updraft-trainer"),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(Unavailable("Redis does not answer"), id="a failed start"),
        pytest.param(ExceptionGroup("tasks", [Unavailable("Redis does not answer")]), id="a failed task"),
    ],
)
def test_a_rank_leaves_its_last_sentence_to_torchrun(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        _end(tmp_path / "error.json", error)

    assert json.loads((tmp_path / "error.json").read_text())["message"] == "Redis does not answer"


def test_a_rank_that_ends_well_asks_to_be_started_again(tmp_path: Path) -> None:
    file = tmp_path / "error.json"

    with pytest.raises(SystemExit) as ended:
        rank(lambda: None, {"TORCHELASTIC_ERROR_FILE": str(file)})

    assert ended.value.code == 1
    assert "another pod was told to stop" in json.loads(file.read_text())["message"]


def test_a_process_that_torchrun_did_not_start_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        _end(None, Unavailable("Redis does not answer"))

    assert list(tmp_path.iterdir()) == []


def test_what_ends_well_leaves_no_words(tmp_path: Path) -> None:
    with last_words({"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}):
        pass

    assert list(tmp_path.iterdir()) == []

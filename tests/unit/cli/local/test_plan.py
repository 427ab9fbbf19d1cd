import sys
import threading
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.support.published_targets import make

from updraft_artifacts.sizing import usual
from updraft_chassis.errors import InvalidInput
from updraft_cli.local import plan
from updraft_cli.local.data_folder import DataFolder
from updraft_cli.local.plan import Addresses, StackConfig
from updraft_cli.local.ports import HOST
from updraft_cli.local.process import Process

_WHERE = Addresses(
    port=8000,
    registry_port=50051,
    registry_metrics_port=9091,
    trainer_metrics_port=9092,
    redis_url="unix:///data/redis.sock",
)


@pytest.fixture
def folder(short_tmp_path: Path) -> DataFolder:
    return DataFolder(short_tmp_path)


def test_redis_comes_first_then_the_registry_then_the_others(folder: DataFolder) -> None:
    stages = plan.stages(config(folder), _WHERE, folder, {})
    assert [[process.name for process in stage] for stage in stages] == [
        ["redis"],
        ["registry"],
        ["trainer", "inference"],
    ]


def test_a_redis_of_the_users_and_no_trainer_leave_two_processes(folder: DataFolder) -> None:
    stages = plan.stages(config(folder, redis_url="redis://host:1", trainer=False), _WHERE, folder, {})
    assert [[process.name for process in stage] for stage in stages] == [["registry"], ["inference"]]


def test_every_service_is_told_where_the_others_are(folder: DataFolder) -> None:
    processes = planned(folder)
    trainer, inference = processes["trainer"].environment, processes["inference"].environment
    assert processes["registry"].environment["UPDRAFT_REGISTRY_PORT"] == "50051"
    assert trainer["UPDRAFT_TRAINER_REDIS_URL"] == inference["UPDRAFT_INFERENCE_REDIS_URL"] == _WHERE.redis_url
    assert trainer["UPDRAFT_TRAINER_REGISTRY_ADDRESS"] == "127.0.0.1:50051"
    assert inference["UPDRAFT_INFERENCE_REGISTRY_ADDRESS"] == "127.0.0.1:50051"
    assert processes["trainer"].command == (sys.executable, "-m", "updraft_trainer")


def test_what_was_not_chosen_is_left_to_the_service(folder: DataFolder) -> None:
    environment = planned(folder)["inference"].environment
    assert "UPDRAFT_INFERENCE_NUM_SLOTS" not in environment
    assert "UPDRAFT_INFERENCE_DRAFTER" not in environment


def test_what_was_chosen_reaches_the_service(folder: DataFolder) -> None:
    chosen = config(folder, slots=2, threads=0, trainer_threads=3, drafter="ngram", lookahead=5, model_name="tiny")
    processes = planned(folder, chosen)
    inference = processes["inference"].environment
    assert {name: inference[f"UPDRAFT_INFERENCE_{name}"] for name in ("NUM_SLOTS", "NUM_THREADS", "LOOKAHEAD")} == {
        "NUM_SLOTS": "2",
        "NUM_THREADS": "0",
        "LOOKAHEAD": "5",
    }
    assert inference["UPDRAFT_INFERENCE_DRAFTER"] == "ngram"
    assert inference["UPDRAFT_INFERENCE_SERVED_MODEL_NAME"] == "tiny"
    assert processes["trainer"].environment["UPDRAFT_TRAINER_NUM_THREADS"] == "3"


def test_settings_win_over_what_the_stack_would_say(folder: DataFolder) -> None:
    chosen = config(folder, slots=2, settings={"UPDRAFT_INFERENCE_NUM_SLOTS": "4"})
    assert planned(folder, chosen)["inference"].environment["UPDRAFT_INFERENCE_NUM_SLOTS"] == "4"


@pytest.mark.parametrize("set_for", ["TRAINER", "INFERENCE"])
def test_sizes_of_the_draft_that_are_set_for_one_process_reach_the_other(folder: DataFolder, set_for: str) -> None:
    chosen = config(folder, settings={f"UPDRAFT_{set_for}_DRAFT_VOCAB_SIZE": "16000"})
    processes = planned(folder, chosen, {f"UPDRAFT_{set_for}_DRAFT_INTERMEDIATE_SIZE": "64"})
    inherited = {f"UPDRAFT_{set_for}_DRAFT_INTERMEDIATE_SIZE": "64"}
    for name in ("TRAINER", "INFERENCE"):
        environment = {**inherited, **processes[name.lower()].environment}
        assert environment[f"UPDRAFT_{name}_DRAFT_VOCAB_SIZE"] == "16000"
        assert environment[f"UPDRAFT_{name}_DRAFT_INTERMEDIATE_SIZE"] == "64"
        assert f"UPDRAFT_{name}_DRAFT_NUM_ATTENTION_HEADS" not in environment


def test_sizes_of_the_draft_that_are_set_for_both_processes_stay_as_they_are(folder: DataFolder) -> None:
    sizes = {"UPDRAFT_TRAINER_DRAFT_VOCAB_SIZE": "16000", "UPDRAFT_INFERENCE_DRAFT_VOCAB_SIZE": "8000"}
    processes = planned(folder, config(folder, settings=sizes))
    assert {name: processes[part].environment[name] for part in ("trainer", "inference") for name in sizes} == sizes


def test_logs_are_for_a_person_unless_the_environment_says_otherwise(folder: DataFolder) -> None:
    environ = {"UPDRAFT_TRAINER_LOG_FORMAT": "json"}
    processes = planned(folder, environ=environ)
    assert processes["registry"].environment["UPDRAFT_REGISTRY_LOG_FORMAT"] == "text"
    assert "UPDRAFT_TRAINER_LOG_FORMAT" not in processes["trainer"].environment


@pytest.mark.parametrize(
    ("strategy", "environ", "expected"),
    [
        pytest.param(None, {}, "Immediate", id="one pod needs no canary"),
        pytest.param("Canary", {}, "Canary", id="as chosen"),
        pytest.param(None, {"UPDRAFT_REGISTRY_STRATEGY": "Manual"}, None, id="as the environment says"),
    ],
)
def test_new_drafts_serve_at_once_unless_one_says_otherwise(
    folder: DataFolder, strategy: str | None, environ: dict[str, str], expected: str | None
) -> None:
    registry = planned(folder, config(folder, strategy=strategy), environ)["registry"].environment
    assert registry.get("UPDRAFT_REGISTRY_STRATEGY") == expected


@pytest.mark.parametrize(
    ("settings", "stop_within_s"),
    [
        pytest.param({}, 35.0, id="the service's default"),
        pytest.param({"UPDRAFT_INFERENCE_DRAIN_SECONDS": "2.5"}, 7.5, id="as set"),
        pytest.param({"UPDRAFT_INFERENCE_DRAIN_SECONDS": "soon"}, 35.0, id="wrong, which the service will say"),
    ],
)
def test_inference_may_drain_before_it_is_killed(
    folder: DataFolder, settings: dict[str, str], stop_within_s: float
) -> None:
    inference = planned(folder, config(folder, settings=settings))["inference"]
    assert inference.stop_within_s == stop_within_s


@pytest.mark.attack(
    boundary="ports",
    attack="reaching the Redis of `updraft up` from the network",
    outcome="it has no port, only a socket",
)
def test_redis_keeps_its_data_in_the_folder_and_opens_no_port(folder: DataFolder) -> None:
    command = " ".join(planned(folder)["redis"].command)
    assert "--port 0" in command
    assert f"--unixsocket {folder.path}/redis.sock" in command
    assert f"--dir {folder.path}/redis" in command
    assert "--appendonly yes" in command


def test_a_setting_without_our_prefix_is_refused(folder: DataFolder) -> None:
    model = folder.path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"OMP_NUM_THREADS is not a setting: settings begin with UPDRAFT_INFERENCE_"):
        plan.check(StackConfig(data=folder.path, model=model, settings={"OMP_NUM_THREADS": "1"}), {})


@pytest.mark.parametrize("name", ["UPDRAFT_INFERENCE_TLS_CERT_FILE", "UPDRAFT_REGISTRY_METRICS_TLS"])
def test_settings_of_tls_are_refused_because_nothing_would_find_the_processes(folder: DataFolder, name: str) -> None:
    (model := folder.path / "model").mkdir()
    (model / "config.json").touch()
    for settings, environ in (({name: "x"}, {}), ({}, {name: "x"})):
        with pytest.raises(InvalidInput, match=f"unset {name}"):
            plan.check(StackConfig(data=folder.path, model=model, settings=settings), environ)


def test_with_vllm_clients_use_its_port_and_the_agent_has_another(folder: DataFolder) -> None:
    where = replace(_WHERE, agent_port=9093)
    chosen = config(folder, engine="vllm", vllm_python=Path("/opt/vllm/bin/python"))
    processes = {one.name: one for stage in plan.stages(chosen, where, folder, {}) for one in stage}
    inference = processes["inference"]

    assert inference.environment["UPDRAFT_INFERENCE_VLLM_PYTHON"] == "/opt/vllm/bin/python"
    assert inference.environment["UPDRAFT_INFERENCE_PORT"] == "8000"
    assert inference.environment["UPDRAFT_INFERENCE_METRICS_PORT"] == "9093"
    assert where.metrics_urls["inference"] == "http://127.0.0.1:9093/metrics"
    assert where.inference_url == "http://127.0.0.1:8000"
    assert inference.start_within_s > processes["registry"].start_within_s
    assert "9093" in inference.address


@pytest.mark.parametrize(("engine", "path"), [("sglang", "/ping"), ("vllm", "/health")])
def test_a_server_is_asked_by_a_path_that_answers_at_once(folder: DataFolder, engine: Any, path: str) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(HTTPStatus.OK)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = replace(_WHERE, port=server.server_port, agent_port=server.server_port)
        chosen = config(folder, engine=engine, **{f"{engine}_python": Path("/opt/bin/python")})
        (*_, inference) = plan.stages(chosen, where, folder, {})[-1]

        assert inference.is_ready()
        server.shutdown()

    assert asked == ["/readyz", path]


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "vllm"},
        {"vllm_python": Path("p")},
        {"engine": "sglang"},
        {"sglang_python": Path("p")},
        {"engine": "sglang", "sglang_python": Path("p"), "vllm_python": Path("p")},
    ],
)
def test_what_runs_a_server_is_named_with_its_engine_and_only_with_it(
    folder: DataFolder, wrong: dict[str, Any]
) -> None:
    (model := folder.path / "model").mkdir()
    (model / "config.json").touch()
    with pytest.raises(InvalidInput, match="require each other"):
        plan.check(replace(config(folder, **wrong), model=model), {})


def test_with_sglang_both_sides_take_the_vocabulary_that_needs_no_traffic_and_the_start_may_take_long(
    folder: DataFolder,
) -> None:
    processes = planned(folder, config(folder, engine="sglang", sglang_python=Path("/opt/sglang/bin/python")))
    inference, trainer = processes["inference"], processes["trainer"]
    assert inference.environment["UPDRAFT_INFERENCE_ENGINE"] == "sglang"
    assert inference.environment["UPDRAFT_INFERENCE_SGLANG_PYTHON"] == "/opt/sglang/bin/python"
    assert "UPDRAFT_INFERENCE_ATTACH" not in inference.environment
    assert inference.start_within_s > trainer.start_within_s


def planned(
    folder: DataFolder, chosen: StackConfig | None = None, environ: dict[str, str] | None = None
) -> dict[str, Process]:
    stages = plan.stages(chosen or config(folder), _WHERE, folder, environ or {})
    return {process.name: process for stage in stages for process in stage}


def config(folder: DataFolder, **changes: object) -> StackConfig:
    values: dict[str, object] = {"data": folder.path, "model": Path("/models/tiny")} | changes
    return StackConfig(**values)  # type: ignore[arg-type] # keyword by keyword, on purpose


def test_redis_has_room_for_twice_the_stream_and_at_least_a_gibibyte(folder: DataFolder) -> None:
    def memory(stream_bytes: int) -> int:
        stages = plan.stages(config(folder), _WHERE, folder, {}, stream_bytes=stream_bytes)
        command = stages[0][0].command
        return int(command[command.index("--maxmemory") + 1])

    assert memory(256 * 2**20) == 2**30
    assert memory(2**30) == 2 * 2**30


def test_the_trainer_knows_the_size_of_the_stream(folder: DataFolder) -> None:
    stages = plan.stages(config(folder), _WHERE, folder, {}, stream_bytes=10**9)
    (trainer,) = [process for stage in stages for process in stage if process.name == "trainer"]
    assert trainer.environment["UPDRAFT_TRAINER_CAPTURE_MAX_BYTES"] == str(10**9)


def test_the_stream_is_sized_by_the_model_unless_the_caller_did(folder: DataFolder, tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)
    described = replace(config(folder), model=tmp_path)
    assert plan.stream_bytes(described, {}) == 256 * 2**20
    assert plan.stream_bytes(described, {"UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES": "5000000"}) == 5_000_000
    assert plan.stream_bytes(config(folder), {}) == usual().stream.amount

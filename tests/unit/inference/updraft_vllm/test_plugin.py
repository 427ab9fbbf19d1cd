import importlib.metadata
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.wait import wait_until

from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import VLLM
from updraft_tap import hooks
from updraft_tap.channel import Channel
from updraft_tap.http.keys import KeysError
from updraft_tap.settings import Settings
from updraft_vllm import configuration, lead, names, plugin, ranks, runners


def test_without_a_socket_the_plugin_does_nothing_and_needs_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPDRAFT_VLLM_SOCKET", raising=False)
    monkeypatch.delenv("UPDRAFT_VLLM_API_KEYS_FILE", raising=False)

    plugin.register()

    assert "vllm" not in sys.modules


@pytest.mark.parametrize(("name", "value"), [("TOP_K", "many"), ("TOP_K", "8")])
def test_what_does_not_fit_is_logged_and_ends_no_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    monkeypatch.setenv("UPDRAFT_VLLM_SOCKET", "/nowhere")
    monkeypatch.setenv(f"UPDRAFT_VLLM_{name}", value)

    plugin.register()  # no vLLM is installed beside these tests

    expected = "UPDRAFT_VLLM_TOP_K is 'many'" if value == "many" else "Scheduler.__init__ does not exist"
    assert expected in caplog.text


@pytest.mark.attack(
    boundary="plugin",
    attack="vLLM settings under which keys would not be checked",
    outcome="the server does not start",
)
@pytest.mark.parametrize(
    ("content", "name", "value", "words"),
    [
        (None, "TOP_K", "8", "cannot read the API keys file"),
        ("short", "TOP_K", "8", "line 1 of .* has 5 characters"),
        ("sk-one-0123456789", "TOP_K", "8", "API keys cannot be enforced: hooks do not fit vLLM"),
        ("sk-one-0123456789", "TOP_K", "many", "TOP_K is 'many'"),
        ("sk-one-0123456789", "MAX_REQUESTS_PER_KEY", "few", "MAX_REQUESTS_PER_KEY is 'few'"),
    ],
)
def test_a_server_that_would_not_ask_for_its_keys_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, name: str, value: str, words: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("UPDRAFT_VLLM_SOCKET", "/nowhere")
    monkeypatch.setenv("UPDRAFT_VLLM_API_KEYS_FILE", str(file))
    monkeypatch.setenv(f"UPDRAFT_VLLM_{name}", value)

    with pytest.raises((KeysError, ValueError), match=words):
        plugin.register()  # no vLLM is installed beside these tests


@pytest.mark.parametrize("way", ["rust", "--grpc", "python -m", "python -m of its old name"])
def test_with_keys_a_server_that_would_bypass_the_middleware_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    (tmp_path / "keys").write_text("sk-one-0123456789")
    monkeypatch.setenv("UPDRAFT_VLLM_API_KEYS_FILE", str(tmp_path / "keys"))
    monkeypatch.setattr(hooks, "install", lambda bindings: {one.target: "" for one in bindings})
    if way == "rust":
        monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    elif way == "--grpc":
        monkeypatch.setattr(sys, "argv", ["vllm", "serve", "model", "--grpc"])
    elif way == "python -m":
        main = ModuleType("__main__")
        main.__spec__ = ModuleSpec(names.GRPC, None)
        monkeypatch.setitem(sys.modules, "__main__", main)
    else:
        monkeypatch.setitem(sys.modules, names.GRPC, ModuleType(names.GRPC))

    with pytest.raises(
        KeysError, match=r"API keys cannot be enforced: (with VLLM_USE_RUST_FRONTEND|vLLM's gRPC server)"
    ):
        plugin.register()


class Client:
    """Stands in for AsyncLLM."""

    def __init__(self, vllm_config: str) -> None:
        self.vllm_config = vllm_config


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Client]:
    """A kind of client as it is once a server that needs keys has registered the plugin, whose other hooks fit."""
    kind = type("AsyncLLM", (Client,), {"__init__": Client.__init__})
    parent = ""
    for part in names.CLIENT.split(".")[:-2]:
        module = ModuleType(f"{parent}.{part}".lstrip("."))
        module.__path__ = []  # as a package has
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if parent:
            monkeypatch.setattr(sys.modules[parent], part, module, raising=False)
        parent = module.__name__
    monkeypatch.setattr(sys.modules[parent], "AsyncLLM", kind, raising=False)
    real = hooks.install
    monkeypatch.setattr(
        hooks,
        "install",
        lambda bindings: {
            one.target: real((one,))[one.target] if one.target == names.CLIENT else "" for one in bindings
        },
    )
    (tmp_path / "keys").write_text("sk-one-0123456789")
    monkeypatch.setenv("UPDRAFT_VLLM_API_KEYS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    assert names.GRPC not in sys.modules
    plugin.register()
    return kind


def test_with_keys_a_server_whose_middleware_is_there_starts(client: type[Client]) -> None:
    assert client("config").vllm_config == "config"


@pytest.mark.attack(
    boundary="plugin",
    attack="a vLLM configuration file that opens a port without keys",
    outcome="the server does not start",
)
def test_with_keys_a_server_whose_config_file_says_grpc_does_not_start(
    monkeypatch: pytest.MonkeyPatch, client: type[Client]
) -> None:
    monkeypatch.setitem(sys.modules, names.GRPC, ModuleType(names.GRPC))  # as vLLM does once it has read the file

    with pytest.raises(KeysError, match="API keys cannot be enforced: vLLM's gRPC server"):
        client("config")


def test_with_keys_a_server_whose_client_is_not_hooked_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sk-one-0123456789")
    monkeypatch.setenv("UPDRAFT_VLLM_API_KEYS_FILE", str(tmp_path / "keys"))
    monkeypatch.setattr(
        hooks, "install", lambda bindings: {one.target: "gone" * (one.target == names.CLIENT) for one in bindings}
    )

    with pytest.raises(KeysError, match=r"hooks do not fit vLLM .*: gone"):
        plugin.register()


def served(method: str = "eagle3", **sizes: Any) -> SimpleNamespace:
    """A scheduler of vLLM whose number of draft tokens is fixed, with these numbers of ranks."""
    alone = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "nnodes": 1}
    parallel = {**alone, "distributed_executor_backend": "mp", **sizes}
    speculative = SimpleNamespace(method=method)
    config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel), speculative_config=speculative)
    return SimpleNamespace(vllm_config=config)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (names.MIDDLEWARE, "requests are counted but not captured: hooks do not fit vLLM"),
        (names.SENDS[0], "requests are counted but not captured: hooks do not fit vLLM"),
        (names.SENDS[1], ""),
    ],
)
def test_where_nobody_can_be_asked_requests_are_still_counted(
    monkeypatch: pytest.MonkeyPatch, missing: str, sentence: str
) -> None:
    monkeypatch.setattr(hooks, "install", lambda bindings: {one.target: "" for one in bindings})
    monkeypatch.setattr(Channel, "start", lambda _: None)
    scheduler = plugin.SchedulerPlugin(Settings(socket="/nowhere"), {missing: "it does not exist"})
    scheduler.start(lambda _: None, served())

    hello = scheduler._hello.facts()
    assert scheduler._channel.problem == ""
    assert hello["unasked"].startswith(sentence)
    assert bool(hello["unasked"]) == bool(sentence)
    assert hello["hooks"][missing] == "it does not exist"


@pytest.mark.parametrize(
    ("scheduler", "problem"),
    [
        (served(), ""),
        (served(tensor_parallel_size=2), ""),
        (served(pipeline_parallel_size=2), ""),
        (served(method="ngram"), ""),
        (
            served(data_parallel_size=2),
            "Updraft supports only tensor parallelism of vLLM, but data parallelism is 2: start one server per replica",
        ),
    ],
)
def test_the_requests_of_one_scheduler_are_counted_also_where_nothing_can_be_captured(
    monkeypatch: pytest.MonkeyPatch, scheduler: SimpleNamespace, problem: str
) -> None:
    monkeypatch.setattr(hooks, "install", lambda bindings: {one.target: "" for one in bindings})
    monkeypatch.setattr(Channel, "start", lambda _: None)
    made = plugin.SchedulerPlugin(Settings(socket="/nowhere", drafting="always"), {})
    made.start(lambda _: None, scheduler)

    assert made._channel.problem == problem, "with one, requests are not even counted"


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_ranks_the_first_one_tells_the_agent(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    started: list[str] = []
    monkeypatch.setattr(hooks, "install", lambda bindings: {one.target: "" for one in bindings})
    monkeypatch.setattr(plugin, "_kind", lambda _: runners.FIRST)
    made = plugin.WorkerPlugin(Settings(socket="/nowhere"))
    monkeypatch.setattr(made._channel, "start", lambda: started.append(made._channel.problem))
    worker = SimpleNamespace(rank=rank, model_runner=SimpleNamespace(device="cpu"))
    config = served(tensor_parallel_size=2, pipeline_parallel_size=2).vllm_config

    made.start(lambda *_: None, SimpleNamespace(worker=worker, vllm_config=config))
    made.warmed_up(lambda _: None, worker)

    why = "Updraft supports only tensor parallelism of vLLM, but pipeline parallelism is 2"
    assert started == ([why] if rank == 0 else [])
    assert made._hello.facts()["loader"] == "scheduler"
    assert ranks.obey(worker, "load", {}) == {"at": ranks.ENDED, "answer": {"refusal": why}}


def test_a_rank_whose_plugin_cannot_start_refuses_drafts_and_only_the_first_one_connects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    made = plugin.WorkerPlugin(Settings(socket="/nowhere"))
    monkeypatch.setattr(made._channel, "start", lambda: started.append(made._channel.problem))
    worker = SimpleNamespace(rank=1, model_runner=SimpleNamespace(device="cpu"))

    made.start(lambda *_: None, SimpleNamespace(worker=worker, vllm_config=served(tensor_parallel_size=2).vllm_config))

    assert started == []
    refusal = ranks.obey(worker, "load", {})["answer"]["refusal"]
    assert refusal.startswith("the plugin could not start: ValueError: SimpleNamespace is none of the model runners")


@pytest.mark.parametrize("size", [1, 2])
def test_a_worker_loads_the_drafts_of_one_rank_and_refuses_those_of_several(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    replies: list[Any] = []
    loads: list[Any] = []
    monkeypatch.setattr(plugin, "_kind", lambda _: runners.FIRST)
    monkeypatch.setattr(hooks, "install", lambda bindings: {one.target: "" for one in bindings})
    made = plugin.WorkerPlugin(Settings(socket="/nowhere"))
    monkeypatch.setattr(made._channel, "start", lambda: None)
    monkeypatch.setattr(made._channel, "reply", replies.append)
    worker = SimpleNamespace(rank=0, model_runner=SimpleNamespace(device="cpu"))
    config = served(tensor_parallel_size=size).vllm_config
    made.start(lambda *_: None, SimpleNamespace(worker=worker, vllm_config=config))
    made._swap, made._no_swap = SimpleNamespace(load=loads.append), ""  # type: ignore[assignment]  # a stand-in

    made._take({"kind": "load", "version": 3})

    assert (len(loads), len(replies)) == ((1, 0) if size == 1 else (0, 1))
    assert all((one["version"], one["refusal"]) == (3, plugin._LED) for one in replies)


def test_a_rank_waits_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(hooks, "install", lambda bindings: {one.target: "" for one in bindings})
    monkeypatch.setattr(plugin, "_kind", lambda _: runners.FIRST)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    made = plugin.WorkerPlugin(Settings(socket="/nowhere"))
    worker = SimpleNamespace(rank=1, model_runner=SimpleNamespace(device="cuda:1"))
    made.start(lambda *_: None, SimpleNamespace(worker=worker, vllm_config=served(tensor_parallel_size=2).vllm_config))

    made._between.settle()  # on a thread of its own, whose current device is another one

    assert waited == [torch.device("cuda:1")]


@pytest.mark.parametrize(("found", "is_led"), [("", True), ("it takes x", False)])
def test_the_engines_process_leads_the_swaps_of_several_ranks_if_its_hooks_fit(
    monkeypatch: pytest.MonkeyPatch, found: str, *, is_led: bool
) -> None:
    replies: list[Any] = []
    monkeypatch.setattr(lead, "_BEGINS_S", 0.0)
    monkeypatch.setattr(
        hooks,
        "install",
        lambda bindings: {one.target: found * one.target.startswith(names.ENGINE_CORE) for one in bindings},
    )
    made = plugin.SchedulerPlugin(Settings(socket="/nowhere", drafting="always"), {})
    monkeypatch.setattr(made._channel, "start", lambda: None)
    monkeypatch.setattr(made._channel, "reply", replies.append)
    made.start(lambda _: None, served(tensor_parallel_size=2))
    made._take({"kind": "load", "version": 3})
    wait_until(lambda: bool(replies))

    assert made._channel.problem == "", "requests are counted"
    (reply,) = replies
    assert (reply["kind"], reply["version"]) == ("loaded", 3)
    expected = (
        "the ranks cannot be reached: vLLM's engine has not begun its loop" if is_led else "hooks do not fit vLLM"
    )
    assert reply["refusal"].startswith(expected)


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({}, ""),
        ({"tensor_parallel_size": 2}, ""),
        ({"tensor_parallel_size": 2, "nnodes": 2}, "Updraft supports several ranks of vLLM only on one node, not on 2"),
        (
            {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
            "several ranks require --distributed-executor-backend mp, but this server uses ray",
        ),
        (
            {"prefill_context_parallel_size": 2},
            "Updraft supports only tensor parallelism of vLLM, but prefill context parallelism is 2",
        ),
    ],
)
def test_ranks_that_vllm_does_not_start_on_one_machine_are_not_captured(sizes: dict[str, Any], why: str) -> None:
    assert configuration.unsupported(served(**sizes).vllm_config) == why


def test_a_server_whose_number_of_drafts_is_fixed_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []
    monkeypatch.setattr(hooks, "install", lambda bindings: installed.extend(one.target for one in bindings))
    scheduler = plugin.SchedulerPlugin(Settings(socket="/nowhere"), {})

    found = scheduler._switch(SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=None)))

    assert list(found.values()) == ["this server does not draft with EAGLE-3"]
    assert not installed


def test_the_folder_is_what_pip_would_have_installed(tmp_path: Path) -> None:
    folder = plugin_folder.write(tmp_path, VLLM)

    (distribution,) = importlib.metadata.distributions(path=[str(folder)])
    (point,) = distribution.entry_points
    assert (point.group, point.name, point.value) == ("vllm.general_plugins", "updraft", "updraft_vllm.plugin:register")
    assert {path.name for path in folder.iterdir() if path.is_dir()} >= {"updraft_tap", "updraft_vllm"}

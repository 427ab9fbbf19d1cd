"""The mark that requests get where they leave vLLM's HTTP process, on stand-ins for its requests and its application."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from updraft_tap.http import door
from updraft_tap.http.door import Door, Rules
from updraft_tap.http.terms import NOT_ASKED, Terms, read_mark
from updraft_tap.settings import DoorSettings
from updraft_vllm.http_process import HttpProcess


class App:
    """Has middleware, as FastAPI has; the last one that is added is the outermost."""

    def __init__(self) -> None:
        self.middleware: list[Any] = ["of vLLM"]

    def add_middleware(self, kind: Any, **options: Any) -> None:
        self.middleware.append((kind, options))


def request(extra: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra))


async def sent(http: HttpProcess, *requests: Any, headers: list[tuple[bytes, bytes]] | None = None) -> list[Terms]:
    """The terms that requests carry; without headers they are sent outside of any HTTP request."""

    async def original(client: Any, request: Any) -> str:
        return f"{client} sent it"

    async def app(*_: Any) -> None:
        for one in requests:
            assert await http.send(original, "the client", one) == "the client sent it"

    if headers is None:
        await app()
    else:
        scope = {"type": "http", "path": "/v1/completions", "headers": headers}
        await Door(app, Rules())(scope, None, None)  # type: ignore[arg-type]  # nothing is received or sent
    return [read_mark(getattr(one.sampling_params, "extra_args", None)) for one in requests if one.sampling_params]


@pytest.fixture
def http() -> HttpProcess:
    return HttpProcess(DoorSettings())


async def test_all_choices_of_a_request_carry_what_its_sender_says(http: HttpProcess) -> None:
    shared = request({"session_id": "7"})
    terms = await sent(http, shared, shared, request(), headers=[(b"x-updraft-domain", b"sql")])

    assert terms == [Terms(domain="sql")] * 3
    assert shared.sampling_params.extra_args["session_id"] == "7"


async def test_the_arguments_that_the_client_sent_are_not_changed_themselves(http: HttpProcess) -> None:
    extra = {"session_id": "7"}
    await sent(http, request(extra), headers=[])
    assert extra == {"session_id": "7"}


async def test_who_opts_out_by_the_header_or_by_the_argument_is_out(http: HttpProcess) -> None:
    by_header = await sent(http, request({"updraft_capture": "on"}), headers=[(b"x-updraft-capture", b"off")])
    by_argument = await sent(http, request({"updraft_capture": "off"}), headers=[(b"x-updraft-capture", b"on")])
    assert [terms.permitted for terms in (*by_header, *by_argument)] == [False, False]


async def test_a_request_that_came_by_no_http_has_not_been_asked(http: HttpProcess) -> None:
    forged = {"updraft": asdict(Terms())}
    assert await sent(http, request(), request(forged)) == [NOT_ASKED, NOT_ASKED]


async def test_a_request_for_an_embedding_passes(http: HttpProcess) -> None:
    assert await sent(http, SimpleNamespace(sampling_params=None), headers=[]) == []


async def test_another_vllms_request_is_sent_without_a_mark(
    http: HttpProcess, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        assert await sent(http, SimpleNamespace(sampling_params=SimpleNamespace()), headers=[]) == [NOT_ASKED]
    assert "the hook terms raised 3 times and is unhooked" in caplog.text


def test_the_plugin_says_with_what_configuration_vllm_started(http: HttpProcess) -> None:
    started: list[Any] = []
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="/model", enforce_eager=True),
        speculative_config=SimpleNamespace(method="eagle3", num_speculative_tokens=3),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            nnodes=1,
            distributed_executor_backend="ray",
        ),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    assert http.facts()["server"] is None

    http.start_client(lambda client, **kwargs: started.append((client, kwargs)), "client", vllm_config=config)

    assert started == [("client", {"vllm_config": config})]
    assert http.facts()["server"] == {
        "model": "/model",
        "method": "eagle3",
        "steps": 3,
        "ranks": {"tensor": 2, "pipeline": 1, "data": 1},
        "unsupported": "several ranks require --distributed-executor-backend mp, but this server uses ray",
        "device": "cpu",
        "eager": True,
    }


def test_another_vllms_configuration_keeps_no_server_from_starting(http: HttpProcess) -> None:
    started: list[Any] = []

    http.start_client(lambda client, config: started.append(client), "client", SimpleNamespace())

    assert started == ["client"]
    assert http.facts()["server"] is None


def test_the_door_is_the_outermost_of_the_servers_middleware(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-one-0123456789")
    http = HttpProcess(DoorSettings(api_keys_file=file, max_requests_per_key=2))
    app = App()
    http.add_middleware(lambda args, app, tasks: app.add_middleware("own", args=args), "args", app, ("generate",))

    assert app.middleware[:2] == ["of vLLM", ("own", {"args": "args"})]
    kind, options = app.middleware[-1]
    assert kind is Door
    assert options["rules"].keys.max_at_once == 2
    assert door.current() is None

"""The mark that requests get where they leave SGLang's HTTP process, on stand-ins for its requests and its application."""

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from updraft_sglang import names
from updraft_sglang.http_process import HttpProcess, misfit, unasked
from updraft_sglang.marks import read_sealed
from updraft_tap.http.door import Door, Rules
from updraft_tap.http.terms import NOT_ASKED, Terms
from updraft_tap.settings import DoorSettings

SHARED = "of the server"


class App:
    """Has middleware, as FastAPI has; the last one that is added is the outermost."""

    def __init__(self) -> None:
        self.user_middleware: list[Any] = []

    def add_middleware(self, kind: Any, **options: Any) -> None:
        self.user_middleware.insert(0, SimpleNamespace(cls=kind, options=options))


def request(custom_params: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom_params))


async def sent(http: HttpProcess, *messages: Any, headers: list[tuple[bytes, bytes]] | None = None) -> list[Terms]:
    """The terms that requests carry; without headers they are sent outside of any HTTP request."""

    async def app(*_: Any) -> None:
        for one in messages:
            assert http.send(lambda manager, obj: f"{manager} sent it", "the manager", one) == "the manager sent it"

    if headers is None:
        await app()
    else:
        scope = {"type": "http", "path": "/generate", "headers": headers}
        await Door(app, Rules())(scope, None, None)  # type: ignore[arg-type]  # nothing is received or sent
    flat = [one for message in messages for one in getattr(message, "batch", (message,))]
    return [read_sealed(one.sampling_params.custom_params, SHARED) for one in flat if hasattr(one, "sampling_params")]


@pytest.fixture
def http() -> HttpProcess:
    return HttpProcess(DoorSettings(), SHARED)


async def test_all_choices_and_all_prompts_of_a_request_carry_what_its_sender_says(http: HttpProcess) -> None:
    shared = request({"thinking_budget": 7})
    several = SimpleNamespace(batch=[request(), request()])
    terms = await sent(http, shared, shared, several, headers=[(b"x-updraft-domain", b"sql")])

    assert terms == [Terms(domain="sql")] * 4
    assert shared.sampling_params.custom_params["thinking_budget"] == 7


async def test_who_opts_out_by_the_header_or_by_the_parameter_is_out(http: HttpProcess) -> None:
    by_header = await sent(http, request({"updraft_capture": "on"}), headers=[(b"x-updraft-capture", b"off")])
    by_parameter = await sent(http, request({"updraft_capture": "off"}), headers=[(b"x-updraft-capture", b"on")])
    assert [terms.permitted for terms in (*by_header, *by_parameter)] == [False, False]


async def test_a_request_that_came_by_no_http_has_not_been_asked_whatever_it_says(http: HttpProcess) -> None:
    forged = {"updraft": asdict(Terms()), "updraft_seal": "guessed"}
    assert await sent(http, request(), request(forged)) == [NOT_ASKED, NOT_ASKED]


@pytest.mark.parametrize("params", [[1], "text", 7])
async def test_parameters_that_are_no_object_cost_the_capture_of_their_request_alone(
    http: HttpProcess, params: Any
) -> None:
    for _ in range(5):
        assert await sent(http, request(params), headers=[]) == [NOT_ASKED]
    assert await sent(http, request(), headers=[(b"x-updraft-domain", b"sql")]) == [Terms(domain="sql")]


@pytest.mark.attack(
    boundary="plugin",
    attack="reading the keys from SGLang's server information",
    outcome="they are not in it",
)
def test_the_configuration_that_the_server_shows_has_no_keys(http: HttpProcess) -> None:
    shown = {"tp_size": 2, "admin_api_key": "secret-of-the-agent", "api_key": None}
    assert http.show(lambda _: shown, "the arguments") == {"tp_size": 2, "admin_api_key": "***", "api_key": None}


@pytest.mark.attack(boundary="plugin", attack="reading the keys from the process list", outcome="they are not in it")
def test_the_command_line_that_the_server_shows_has_no_keys(http: HttpProcess) -> None:
    arguments = SimpleNamespace(
        admin_api_key="secret-of-the-agent",
        api_key=None,
        _launch_command="--admin-api-key secret-of-the-agent --model-path /models/tiny",
    )

    http.resolve(lambda _: None, arguments)

    assert arguments._launch_command == "--admin-api-key *** --model-path /models/tiny"


def test_a_key_that_begins_with_the_other_is_hidden_whole(http: HttpProcess) -> None:
    arguments = SimpleNamespace(admin_api_key="abcd", api_key="abcdefgh", _launch_command="--api-key abcdefgh")

    http.resolve(lambda _: None, arguments)

    assert arguments._launch_command == "--api-key ***"


def test_a_server_starts_although_its_command_line_cannot_be_hidden_and_the_log_has_no_key(
    http: HttpProcess, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = SimpleNamespace(admin_api_key="secret-of-the-agent", api_key=None, _launch_command=["a", "list"])

    http.resolve(lambda _: None, arguments)

    assert "cannot hide SGLang's keys" in caplog.text
    assert "secret-of-the-agent" not in caplog.text


async def test_the_agent_that_shows_the_admin_key_needs_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-one-0123456789\n")
    http = HttpProcess(DoorSettings(api_keys_file=file), SHARED)
    app, passed, sent = App(), list[str](), list[Any]()
    manager = SimpleNamespace(server_args=SimpleNamespace(admin_api_key="secret-of-the-agent"))
    monkeypatch.setattr(HttpProcess, "add_door", lambda self, app: app.add_middleware(Door, rules=self._rules))
    monkeypatch.setitem(sys.modules, names.HTTP, SimpleNamespace(app=app))
    http.start(lambda manager: None, manager)

    async def inside(scope: Any, *_: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    door = Door(inside, app.user_middleware[0].options["rules"])
    for path, key in (("/pause_generation", b"secret-of-the-agent"), ("/generate", b"sk-other-012345678")):
        scope = {"type": "http", "path": path, "headers": [(b"authorization", b"Bearer " + key)]}
        await door(scope, None, send)  # type: ignore[arg-type]  # nothing is received

    assert passed == ["/pause_generation"]
    assert sent[0]["status"] == 401


@pytest.mark.attack(
    boundary="plugin",
    attack="an SGLang release whose requests would bypass the keys",
    outcome="the server does not start",
)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"grpc_port": 50051}, "leave out --grpc-port"),
        ({"encoder_only": True}, "--encoder-only"),
        ({"disaggregation_mode": "prefill"}, "leave out --disaggregation-mode"),
        ({"disaggregation_mode": "decode"}, "leave out --disaggregation-mode"),
    ],
)
def test_with_keys_a_server_whose_requests_bypass_them_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    (tmp_path / "keys").write_text("sk-one-0123456789\n")
    keyless, http = (HttpProcess(DoorSettings(api_keys_file=file), SHARED) for file in (None, tmp_path / "keys"))
    for name in ("sglang", "sglang.srt", "sglang.srt.arg_groups"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    views = SimpleNamespace(resolving_view=lambda arguments: arguments)
    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.overrides", views)
    plain = {"smg_grpc_mode": False, "grpc_mode": False, "grpc_port": None, "encoder_only": False}
    arguments = SimpleNamespace(**{**plain, "disaggregation_mode": "null", **changes})

    assert keyless.resolve(lambda _: "resolved", arguments) == "resolved"
    with pytest.raises(SystemExit, match=rf"API keys cannot be enforced: .*{reason}") if reason else nullcontext():
        http.resolve(lambda _: "resolved", arguments)


async def test_messages_that_ask_for_no_text_pass(http: HttpProcess) -> None:
    assert await sent(http, SimpleNamespace(rid="aborted"), headers=[]) == []


def started(http: HttpProcess, monkeypatch: pytest.MonkeyPatch, app: App | None) -> App | None:
    """The application after SGLang's manager of requests was made."""
    if app is not None:
        module = ModuleType(names.HTTP)
        vars(module).update(app=app, _wait_and_warmup=lambda server_args: server_args)
        for name in names.HTTP.split("."):
            path = names.HTTP[: names.HTTP.index(name) + len(name)]
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        monkeypatch.setitem(sys.modules, names.HTTP, module)
    assert http.start(lambda manager: manager, "the manager") == "the manager"
    return app


def test_the_door_tells_what_the_plugin_found() -> None:
    http = HttpProcess(DoorSettings(), SHARED, version="0.5.23", socket="/none/tap.sock")
    http.found = {names.ARGUMENTS: "it does not exist"}

    told = http.facts()

    assert told["engine"] == {"name": "SGLang", "version": "0.5.23"}
    assert (told["socket"], told["agent"], told["keys"]) == ("/none/tap.sock", False, False)
    assert told["hooks"] == {names.ARGUMENTS: "it does not exist"}


def test_the_middleware_is_added_once_before_the_process_serves(
    http: HttpProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App()
    started(http, monkeypatch, app)
    http.add_door(app)

    assert [one.cls for one in app.user_middleware] == [Door]


def test_without_http_the_process_starts_unless_it_should_require_keys(
    http: HttpProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-one-0123456789\n")
    started(http, monkeypatch, None)

    with pytest.raises(SystemExit, match="this process has no HTTP application to which a middleware can be added"):
        started(HttpProcess(DoorSettings(api_keys_file=file), SHARED), monkeypatch, None)


def test_hooks_that_do_not_fit_are_said_but_the_one_for_keys_alone_costs_no_capture() -> None:
    found = {names.ARGUMENTS: "", f"{names.MANAGER}.__init__": ""}
    assert (misfit(found), unasked(found)) == ("", "")
    assert unasked({**found, names.ARGUMENTS: "it does not exist"}) == ""
    assert unasked({**found, f"{names.MANAGER}.__init__": "it does not exist"}) == (
        "requests are counted but not captured: it does not exist"
    )


def test_behind_sglangs_rust_server_requests_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(names.RUST, "1")
    assert unasked({}).endswith("SGLang's HTTP server is not in Python; unset it")

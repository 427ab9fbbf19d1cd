"""The middleware, called as an ASGI server calls it."""

import asyncio
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from updraft_tap.http import about, door
from updraft_tap.http.about import Facts
from updraft_tap.http.door import Door, Rules, choices
from updraft_tap.http.keys import Keys, RefusedRequestError
from updraft_tap.http.terms import Terms, tenant_digest

ONE, OTHER = "sk-one-0123456789", "sk-other-0123456789"
OPEN = Rules()
BEARER = [(b"authorization", f"Bearer {ONE}".encode())]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    file = tmp_path / "keys"
    file.write_text(f"{ONE}\n{OTHER}\n")
    return Keys(file, max_at_once=2)


async def asked(
    rules: Rules, facts: Facts, headers: Sequence[tuple[bytes, bytes]] = (), *, status: int = 404
) -> tuple[int, Any]:
    """The status and the answer at the path of the plugin, where the application behind answers with `status`."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def server(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b'"of the server"', "more_body": False})

    scope = {"type": "http", "method": "GET", "path": about.PATH, "headers": list(headers)}
    await Door(server, rules, facts)(scope, receive, send)
    assert len(sent) == 2
    return sent[0]["status"], json.loads(sent[1]["body"])


async def test_the_plugin_says_what_it_found_behind_the_key(keys: Keys) -> None:
    rules = Rules(keys=keys)

    assert (await asked(rules, lambda: {"tap": "1"}))[0] == 401
    assert await asked(rules, lambda: {"tap": "1"}, BEARER) == (200, {"tap": "1"})
    assert await asked(OPEN, lambda: {"tap": "1"}) == (200, {"tap": "1"})


async def test_the_plugin_says_nothing_to_whom_the_server_itself_refuses() -> None:
    assert await asked(OPEN, lambda: {"tap": "1"}, status=401) == (401, "of the server")


async def test_facts_that_cannot_be_read_are_an_answer_too() -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("no such file")

    assert await asked(OPEN, broken) == (500, {"error": "the plugin cannot be read; see the server's log"})


def test_whether_an_agent_listens_is_found_out(short_tmp_path: Path) -> None:
    path = str(short_tmp_path / "tap.sock")
    assert not about.listens(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        assert not about.listens(path), "a file that was left over"
        listener.listen()
        assert about.listens(path)


class Server:
    """An application behind the door; it answers when it may."""

    def __init__(self, rules: Rules = OPEN) -> None:
        self.terms: list[Terms | None] = []
        self.bodies: list[bytes] = []
        self.disconnects = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.two_are_in = asyncio.Event()
        self.door = Door(self._app, rules)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        async with asyncio.TaskGroup() as group:
            told = group.create_task(_terms())
        self.terms.append(told.result())
        if len(self.terms) == 2:
            self.two_are_in.set()
        await self.may_answer.wait()
        if (await receive())["type"] == "http.disconnect":
            self.disconnects += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    async def ask(
        self,
        headers: Sequence[tuple[bytes, bytes]] = (),
        *,
        body: Sequence[bytes] = (b"{}",),
        **scope: Any,
    ) -> tuple[dict[str, Any], bytes]:
        """The start of the answer, and its body."""
        parts = [{"type": "http.request", "body": part, "more_body": i + 1 < len(body)} for i, part in enumerate(body)]
        incoming, sent = iter([*parts, {"type": "http.disconnect"}]), list[dict[str, Any]]()

        async def receive() -> Any:
            return next(incoming)

        async def send(message: Any) -> None:
            sent.append(message)

        about = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": list(headers), **scope}
        await self.door(about, receive, send)
        start, *rest = sent
        return start, b"".join(message.get("body", b"") for message in rest)


async def _terms() -> Terms | None:
    return door.current()


async def test_what_the_sender_says_is_there_in_every_task_of_its_request_and_nowhere_else() -> None:
    server = Server()
    await server.ask([(b"x-updraft-domain", b"sql")])
    await server.ask([(b"x-updraft-capture", b"off")])

    assert server.terms == [Terms(domain="sql"), Terms(permitted=False)]
    assert door.current() is None


async def test_the_tenant_is_the_keys_unless_the_header_of_a_gateway_names_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"acme {ONE} gateway\nrival {OTHER} no-train,on,retain=12h,region=eu\n")
    bearer = [(b"authorization", f"Bearer {key}".encode()) for key in (ONE, OTHER)]
    by_key, by_header = Server(Rules(keys=Keys(file))), Server(Rules(keys=Keys(file), tenant_header=b"x-team"))
    for server in (by_key, by_header):
        await server.ask([bearer[0], (b"x-team", b"other")])
        await server.ask([bearer[1], (b"x-team", b"acme")])

    acme, rival, other = (tenant_digest(name) for name in (b"acme", b"rival", b"other"))
    of_rival = Terms(tenant=rival, train=False, opted_in=True, retention_s=43_200, region="eu")
    assert by_key.terms == [Terms(tenant=acme), of_rival]
    assert by_header.terms == [Terms(tenant=other), of_rival]
    assert door.current() is None


async def test_two_headers_with_a_tenant_get_status_400() -> None:
    server = Server(Rules(tenant_header=b"x-team"))
    start, _ = await server.ask([(b"x-team", b"acme"), (b"x-team", b"rival")])
    await server.ask([(b"x-team", b"acme")])

    assert start["status"] == 400
    assert server.terms == [Terms(tenant=tenant_digest(b"acme"))]


async def test_concurrent_requests_keep_their_own_terms() -> None:
    server = Server()
    await asyncio.gather(*(server.ask([(b"x-updraft-domain", str(i).encode())]) for i in range(20)))
    assert {terms.domain for terms in server.terms if terms} == {str(i) for i in range(20)}


async def test_a_misspelt_header_is_answered_as_openai_does() -> None:
    server = Server()
    start, body = await server.ask([(b"x-updraft-capture", b"of")])

    assert (start["status"], server.terms) == (400, [])
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert "expected on, off, no-train or no-retain, got 'of'" in json.loads(body)["error"]["message"]


@pytest.mark.attack(
    boundary="plugin",
    attack="a request without a known API key, on any path",
    outcome="401 everywhere except health and metrics",
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/tokenize", "/invocations", "/", "/healthy"])
async def test_without_a_known_key_nothing_but_probes_is_answered(keys: Keys, path: str) -> None:
    server = Server(Rules(keys=keys))
    for headers in ([], [(b"authorization", b"Bearer sk-wrong-0123456789")]):
        start, body = await server.ask(headers, path=path)
        assert start["status"] == 401
        assert (b"www-authenticate", b"Bearer") in start["headers"]
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert server.terms == []
    assert (await server.ask(BEARER, path=path))[0]["status"] == 200


@pytest.mark.attack(boundary="plugin", attack="a compressed body", outcome="400 before it is unpacked")
async def test_a_compressed_body_whose_choices_nobody_could_count_is_refused(keys: Keys) -> None:
    server = Server(Rules(keys=keys))
    start, body = await server.ask([*BEARER, (b"x-body-compressed", b"zstd")], body=(b"\x28\xb5",))

    assert (start["status"], server.bodies) == (400, [])
    assert "the body cannot be compressed" in json.loads(body)["error"]["message"]


@pytest.mark.attack(boundary="plugin", attack="a guessed secret of the server's own processes", outcome="401")
async def test_the_servers_requests_to_itself_need_no_key_and_ask_nobody(keys: Keys) -> None:
    server = Server(Rules(keys=keys, own="secret of its processes"))
    for shown, status in ((b"secret of its processes", 200), (b"guessed", 401), (b"", 401)):
        start, _ = await server.ask([(door.OWN, shown)])
        assert start["status"] == status
    assert server.terms == [None]


async def test_without_a_secret_no_request_is_the_servers_own(keys: Keys) -> None:
    start, _ = await Server(Rules(keys=keys)).ask([(door.OWN, b"")])
    assert start["status"] == 401


@pytest.mark.parametrize(
    "about", [{"path": "/health"}, {"path": "/ready"}, {"path": "/metrics/"}, {"method": "OPTIONS"}]
)
async def test_probes_metrics_and_preflights_need_no_key(keys: Keys, about: dict[str, Any]) -> None:
    assert (await Server(Rules(keys=keys)).ask(**about))[0]["status"] == 200


@pytest.mark.attack(boundary="plugin", attack="a path that only looks like a health check", outcome="401")
async def test_a_path_under_the_servers_root_is_the_same_path(keys: Keys) -> None:
    server = Server(Rules(keys=keys))
    assert (await server.ask(path="/llm/health", root_path="/llm"))[0]["status"] == 200
    assert (await server.ask(path="/llm/v1/models", root_path="/llm"))[0]["status"] == 401
    assert (await server.ask(path="/health", root_path="/llm"))[0]["status"] == 200, "a proxy has taken the root off"
    for path, root in (("/llm/health", ""), ("/other/health", "/llm"), ("/llm/health/../v1/models", "/llm")):
        assert (await server.ask(path=path, root_path=root))[0]["status"] == 401


async def test_the_third_concurrent_request_of_a_key_waits_for_a_place(keys: Keys) -> None:
    server = Server(Rules(keys=keys))
    server.may_answer.clear()
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(server.ask(BEARER)) for _ in range(2)]
        await server.two_are_in.wait()
        start, body = await server.ask(BEARER)
        server.may_answer.set()
        other = await server.ask([(b"authorization", f"Bearer {OTHER}".encode())])

    assert start["status"] == 429
    assert (b"retry-after", b"1") in start["headers"]
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert [one.result()[0]["status"] for one in running] == [200, 200]
    assert other[0]["status"] == 200
    assert (await server.ask(BEARER))[0]["status"] == 200


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_key_has_its_place_back_when_a_client_sees_the_end_of_its_answer(
    keys: Keys, *, is_streamed: bool
) -> None:
    async def server(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if is_streamed:
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await send({"type": "http.response.body", "body": b"" if is_streamed else b"whole"})

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"n": 2}'}

    has_place: list[bool] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            try:
                with keys.admitted(ONE):
                    has_place.append(True)
            except RefusedRequestError:
                has_place.append(False)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": BEARER}
    await Door(server, Rules(keys=keys))(scope, receive, send)

    assert has_place == ([False, True] if is_streamed else [True])


async def test_each_choice_takes_a_place_and_the_body_arrives_whole(keys: Keys) -> None:
    server = Server(Rules(keys=keys))
    whole = [b'{"prompt": "a", ', b'"n"', b": 2}"]
    assert (await server.ask(BEARER, body=whole))[0]["status"] == 200
    assert server.bodies == [b"".join(whole)]
    assert server.disconnects == 1, "what came after the body arrives too"

    start, body = await server.ask(BEARER, body=[b'{"n": 3}'])
    assert start["status"] == 400
    assert "n is 3, but an API key may have at most 2" in json.loads(body)["error"]["message"]


@pytest.mark.attack(boundary="plugin", attack="a background answer, to get around the limit of a key", outcome="400")
@pytest.mark.parametrize("more", [b"", b', "n": "x"', b', "prompt": 7, "messages": "a"', b', "n": 1e999'])
async def test_an_answer_in_the_background_which_nobody_could_count_is_refused(
    keys: Keys, more: bytes, tmp_path: Path
) -> None:
    server = Server(Rules(keys=keys))
    sent = b'{"background": true, "input": "a"%s}' % more
    start, body = await server.ask(BEARER, path="/v1/responses", body=[sent])

    assert (start["status"], server.terms) == (400, [])
    assert "background cannot be true" in json.loads(body)["error"]["message"]
    assert len(keys._inside) == 0
    unlimited = Server(Rules(keys=Keys(tmp_path / "keys")))
    assert (await unlimited.ask(BEARER, body=[b'{"background": true}']))[0]["status"] == 200


@pytest.mark.parametrize("fate", [asyncio.CancelledError(), RuntimeError("of the server")])
async def test_a_request_that_ends_in_any_way_gives_its_place_back(keys: Keys, fate: BaseException) -> None:
    async def app(*_: Any) -> None:
        raise fate

    server = Server(Rules(keys=keys))
    server.door = Door(app, Rules(keys=keys))
    for _ in range(5):
        with pytest.raises(type(fate)):
            await server.ask(BEARER)
    assert len(keys._inside) == 0


async def test_a_refusal_from_within_the_server_is_not_answered_twice(keys: Keys) -> None:
    async def app(*_: Any) -> None:
        raise RefusedRequestError(401, "of another door")

    server = Server()
    server.door = Door(app, Rules(keys=keys))
    with pytest.raises(RefusedRequestError):
        await server.ask(BEARER)


@pytest.mark.attack(boundary="plugin", attack="a WebSocket without a key", outcome="it is closed before it opens")
async def test_a_websocket_without_a_key_is_closed_before_it_opens(keys: Keys) -> None:
    start, _ = await Server(Rules(keys=keys)).ask(type="websocket", path="/v1/realtime")
    assert (start["type"], start["code"]) == ("websocket.close", 1008)


async def test_a_websocket_with_a_key_passes_with_the_terms_of_its_sender_and_takes_a_place(keys: Keys) -> None:
    seen, inside = list[Terms | None](), list[int]()

    async def app(*_: Any) -> None:
        seen.append(door.current())
        inside.extend(keys._inside.values())

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [*BEARER, (b"x-updraft-domain", b"voice")]}
    await Door(app, Rules(keys=keys))(scope, None, None)  # type: ignore[arg-type]  # nothing is said

    assert [terms.domain for terms in seen if terms] == ["voice"]
    assert (inside, len(keys._inside)) == ([1], 0)


async def test_the_life_of_the_server_itself_passes() -> None:
    await Server().door({"type": "lifespan"}, None, None)  # type: ignore[arg-type]  # nothing is said


@pytest.mark.parametrize(
    ("body", "num"),
    [
        (b"", 1),
        (b"[" * 100_000, 1),
        (b"\xff", 1),
        (b"[1]", 1),
        (b'{"n": 3}', 3),
        (b'{"\\u006e": 3}', 3),
        ('{"n": 3}'.encode("utf-16"), 3),
        (b'{"n": -3}', 1),
        (b'{"n": "3"}', 3),
        (b'{"n": 3.0}', 3),
        (b'{"n": "3.0"}', 3),
        (b'{"n": "x"}', 1),
        (b'{"n": {}}', 1),
        (b'{"n": 1e400}', 1),
        (b'{"n": [3]}', 1),
        (b'{"n": null}', 1),
        (b'{"n": true}', 1),
        (b'{"prompt": ["a", "b"], "n": 2}', 4),
        (b'{"prompt": [[1, 2], [3]]}', 2),
        (b'{"prompt": [1, 2, 3]}', 1),
        (b'{"prompt": []}', 1),
        (b'{"prompt_embeds": ["a", "b"], "prompt": "c"}', 2),
        (b'{"prompt_embeds": ["a", "b"], "prompt": ["c"]}', 3),
        (b'{"messages": [{"role": "user"}, {"role": "user"}], "n": 2}', 2),
        (b'{"messages": [[{"role": "user"}], [{"role": "user"}]]}', 2),
        (b'{"sampling_params": {"n": 4}, "token_ids": [1, 2]}', 4),
        (b'{"token_ids": [1], "n": "x", "sampling_params": {"n": 64}}', 64),
        (b'{"sampling_params": {"n": [1]}, "n": 2, "prompt": ["a", "b"]}', 4),
        (b'{"sampling_params": 7, "n": 2}', 2),
        (b'{"background": false}', 1),
        (b'{"text": "a", "sampling_params": {"n": 2}}', 2),
        (b'{"text": ["a", "b"], "sampling_params": {"n": 2}}', 4),
        (b'{"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 2}]}', 4),
        (b'{"sampling_params": [7, null]}', 1),
        (b'{"input_ids": [1, 2]}', 1),
        (b'{"input_ids": [[1, 2], [3]]}', 2),
        (b'{"input_embeds": [[0.5], [0.5]]}', 1),
        (b'{"input_embeds": [[[0.5]], [[0.5]]]}', 2),
        (b'{"input_embeds": [[]]}', 1),
        (b'{"instances": [{"text": "a"}, {"text": "b"}], "parameters": {"sampling_params": {"n": 2}}}', 4),
        (b'{"instances": [], "parameters": []}', 1),
    ],
)
def test_choices_are_counted_as_the_server_will_make_them(body: bytes, num: int) -> None:
    assert choices(body) == num

"""What kopf lists is held in memory until it was seen, and which events lead to a plan."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import kopf
import pytest
from aiohttp import web
from kopf._core.reactor import queueing

from updraft_operator.watching.cluster import KINDS
from updraft_operator.watching.handlers import MAX_WORKERS, WORKER, Forgetful, Watches, login, paced, settings
from updraft_operator.watching.store import Store

LIST, NEXT, WATCH = "limit=100", "limit=100&continue=abc", "watch=true"


class Server:
    """Answers every question, and remembers which came."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.query_string)
        return web.json_response({"items": []})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """On a free port."""
    made, application = Server(), web.Application()
    application.router.add_get("/pods", made.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    made.url = f"http://{host}:{port}/pods"
    yield made
    await runner.cleanup()


async def test_no_page_is_asked_for_while_much_of_the_last_ones_is_left_to_see(server: Server) -> None:
    listed = asyncio.Event()
    async with aiohttp.ClientSession(middlewares=(paced,)) as session, asyncio.TaskGroup() as tasks:
        for number in range(MAX_WORKERS + 1):
            tasks.create_task(listed.wait(), name=f"{WORKER}{number}")
        pages = [tasks.create_task(_get(session, server, query)) for query in (LIST, NEXT)]
        await _get(session, server, WATCH)
        assert server.asked == [WATCH], "a watch waits for nothing"
        listed.set()
        await asyncio.wait(pages)
        assert sorted(server.asked[1:]) == [LIST, NEXT]


async def test_a_page_is_asked_for_once_little_is_left_to_see(server: Server) -> None:
    never = asyncio.Event()
    async with aiohttp.ClientSession(middlewares=(paced,)) as session, asyncio.TaskGroup() as tasks:
        left = [tasks.create_task(never.wait(), name=f"{WORKER}{number}") for number in range(10)]
        left += [tasks.create_task(never.wait(), name="watcher") for _ in range(2 * MAX_WORKERS)]
        await _get(session, server, LIST)
        assert server.asked == [LIST]
        assert not any(task.done() for task in left)
        never.set()


async def test_kopf_lists_in_pages_and_through_the_paced_session(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _say_credentials(monkeypatch, tmp_path, server, "first")
    assert settings().watching.chunk_size
    credentials = await login(settings=settings())
    assert credentials is not None
    async with credentials.aiohttp_session as session:
        assert credentials.server == server.url
        await _get(session, server, LIST)


async def test_credentials_that_were_refused_are_known_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logins = []
    for token in ("first", "first", "second"):
        _say_credentials(monkeypatch, tmp_path, server, token)
        credentials = await login(settings=settings())
        assert credentials is not None
        await credentials.aiohttp_session.close()
        logins.append(credentials)
    assert logins[0] == logins[1] != logins[2]


def test_kopf_names_the_tasks_that_are_counted_so() -> None:
    assert f"name=f'{WORKER}{{key}}'" in inspect.getsource(queueing.watcher)


async def test_kopf_keeps_no_record_of_an_object() -> None:
    memories = Forgetful()
    body = cast("kopf.RawBody", _speculator(1))
    await memories.recall(body, noticed_by_listing=True)
    await memories.forget(body)
    await memories.recall(body)
    assert list(memories.iter_all_memories()) == []


def _say_credentials(monkeypatch: pytest.MonkeyPatch, folder: Path, server: Server, token: str) -> None:
    content = {
        "clusters": [{"name": "c", "cluster": {"server": server.url}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(content))
    monkeypatch.setenv("KUBECONFIG", str(path))


async def _get(session: aiohttp.ClientSession, server: Server, query: str) -> None:
    async with session.get(f"{server.url}?{query}") as answer:
        assert answer.status == 200


def _speculator(version: int, status: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    metadata = {"name": "qwen", "namespace": "team", "uid": "u", "generation": 1, "resourceVersion": str(version)}
    spec = {"targetModel": {"uri": "/models/tiny"}}
    return {"metadata": {**metadata, **more}, "spec": spec, "status": status or {}}


def _draft(at: int, status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    metadata = {"name": "qwen-v1", "namespace": "team", "uid": "d", "generation": 1, "resourceVersion": str(at)}
    spec = {"speculatorRef": {"name": "qwen"}, "source": "Trainer", "version": 1, **spec}
    return {"metadata": metadata, "spec": spec, "status": status or {}}


def _import(at: int, **status: Any) -> dict[str, Any]:
    metadata = {"name": "mine", "namespace": "team", "uid": "i", "generation": 1, "resourceVersion": str(at)}
    spec = {"speculatorRef": {"name": "qwen"}, "uri": "hf://org/draft"}
    return {"metadata": metadata, "spec": spec, "status": status}


def _told(kind: str, known: dict[str, Any], news: dict[str, Any], change: str | None = "MODIFIED") -> list[str]:
    """What a watch asks for after an event about an object of which `known` is cached."""
    asked, store = list[str](), Store()
    store.put(kind, known)
    watches = Watches(store, lambda _: asked.append("plan"), lambda _: asked.append("refresh"), (), KINDS)
    watches._on_event(kind, cast("kopf.RawEvent", {"type": change, "object": news}))
    return asked


def test_a_status_that_was_written_leads_to_no_plan() -> None:
    told = {"acceptance": {"stable": "2.10"}}
    assert _told("AdaptiveSpeculator", _speculator(5), _speculator(6, told)) == ["refresh"]
    measured = {"phase": "Stable", "acceptance": {"length": "2.10"}}
    assert _told("DraftVersion", _draft(5), _draft(6, measured)) == ["refresh"]


@pytest.mark.parametrize("change", ["ADDED", "MODIFIED"])
def test_the_answer_to_a_write_of_our_own_leads_to_nothing(change: str) -> None:
    assert _told("AdaptiveSpeculator", _speculator(6), _speculator(6), change) == []
    assert _told("DraftVersion", _draft(6), _draft(6), change) == []


@pytest.mark.parametrize(
    ("kind", "known", "news", "change"),
    [
        ("AdaptiveSpeculator", _speculator(5), _speculator(6, generation=2), "MODIFIED"),
        ("AdaptiveSpeculator", _speculator(5), _speculator(6, finalizers=["x"]), "MODIFIED"),
        ("AdaptiveSpeculator", _speculator(5), _speculator(6, deletionTimestamp="2026-11-25T12:00:00Z"), "MODIFIED"),
        ("AdaptiveSpeculator", _speculator(5), _speculator(6), "DELETED"),
        ("AdaptiveSpeculator", _speculator(5), _speculator(5), None),
        ("AdaptiveSpeculator", _speculator(5), _speculator(6), "ADDED"),
        ("DraftVersion", _draft(5), _draft(6, retain=True), "MODIFIED"),
        ("DraftImport", _import(5), _import(6, version=1), "MODIFIED"),
    ],
)
def test_whatever_may_change_an_object_leads_to_a_plan(
    kind: str, known: dict[str, Any], news: dict[str, Any], change: str | None
) -> None:
    assert _told(kind, known, news, change) == ["plan"]

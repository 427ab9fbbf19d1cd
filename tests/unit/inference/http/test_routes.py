"""The routes without a server: the messages that an answer consists of."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp
from tests.support.fake_engine import FakeEngine
from tests.support.tiny_tokenizer import TEMPLATE, byte_level

from updraft_chassis.errors import Exhausted
from updraft_inference.agent import selection
from updraft_inference.agent.completions import CompletionListeners
from updraft_inference.agent.selection import CaptureRates
from updraft_inference.http.body import BodyLimits
from updraft_inference.http.generation import ServedModel
from updraft_inference.http.keys import Keys
from updraft_inference.http.readiness import Readiness
from updraft_inference.http.routes import app
from updraft_inference.metrics import Metrics
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer

KEY = "sk-of-the-test-0123456789"
HEADERS = [(b"authorization", f"Bearer {KEY}".encode())]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").write_text(KEY)
    return Keys(tmp_path / "keys", max_at_once=1)


def application(keys: Keys) -> ASGIApp:
    engine = FakeEngine()
    completions = CompletionListeners(asyncio.get_running_loop())
    engine.on_finished = completions.sink
    readiness: Readiness[ServedModel] = Readiness(max_inside=8)
    readiness.open(
        ServedModel(
            model="tiny",
            engine=engine,
            tokenizer=Tokenizer(byte_level()),
            chat_template=ChatTemplate(TEMPLATE, {"eos_token": "<|end|>"}),
            completions=completions,
            plan=lambda trace_id, terms: selection.plan(CaptureRates(), trace_id, terms),
        )
    )
    registry = CollectorRegistry()
    return app(readiness, Metrics(registry), registry, BodyLimits(max_bytes=1000, timeout_s=5.0), keys)


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
async def test_a_key_has_its_place_back_when_a_client_sees_the_end_of_its_answer(
    keys: Keys, more: dict[str, Any]
) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 3, **more}).encode()
    arriving = asyncio.Queue[Any]()
    arriving.put_nowait({"type": "http.request", "body": body})
    bodies, has_place = list[bytes](), list[bool]()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])
            try:
                with keys.admitted({"authorization": f"Bearer {KEY}"}):
                    has_place.append(True)
            except Exhausted:
                has_place.append(False)

    path = "/v1/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    await application(keys)({**scope, "headers": HEADERS}, arriving.get, send)

    assert has_place == [False] * (len(bodies) - 1) + [True]
    assert bodies[-1] == b"data: [DONE]\n\n" if more else json.loads(bodies[-1])["choices"]

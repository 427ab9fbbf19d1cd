"""Whatever a client sends, the answer is an answer or the client's mistake: never a 5xx."""

import asyncio
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tests.support.fake_engine import FakeEngine
from tests.support.tiny_tokenizer import TEMPLATE, byte_level

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

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["tiny", "user", "text", "none", "ngram", "eagle3", "json_object"]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed",
    "stop", "stream", "stream_options", "ignore_eos", "updraft", "n", "logprobs", "top_logprobs", "tools", "user",
    "response_format", "min_p", "logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty",
]  # fmt: skip
plausible = {
    "max_tokens": st.integers(1, 70),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 50),
    "seed": st.integers(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "n": st.integers(0, 9),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 101),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(
        st.integers(-1, 300).map(str) | st.text(max_size=3), st.floats(-101, 101), max_size=3
    ),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "top_logprobs": st.integers(-1, 21),
    "response_format": st.builds(
        lambda kind, schema: {"type": kind, "json_schema": {"name": "x", "schema": schema}},
        st.sampled_from(["text", "json_object", "json_schema", "x"]),
        st.dictionaries(st.sampled_from(["type", "enum", "minimum", "x"]), json_values, max_size=3),
    ),
    "ignore_eos": st.booleans(),
    "updraft": st.fixed_dictionaries(
        {}, optional={"drafter": st.sampled_from(["none", "ngram", "eagle3", "x"]), "lookahead": st.integers(0, 70)}
    ),
}
prompts = st.text(max_size=40) | st.lists(st.integers(-1, 300), max_size=20)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "developer", "tool"]), "content": st.text(max_size=9)}
    ),
    max_size=3,
)
bodies = st.builds(
    lambda base, likely, wild: {**base, **likely, **wild},
    st.fixed_dictionaries({"model": st.just("tiny"), "prompt": prompts, "messages": messages}),
    st.fixed_dictionaries({}, optional=plausible),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=2),
)


def client() -> httpx.AsyncClient:
    """Straight into the application; its errors would come out as exceptions."""
    engine = FakeEngine(max_context=64, max_queued=6)
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
    bodies = BodyLimits(max_bytes=100_000, timeout_s=5.0)
    application = app(readiness, Metrics(registry), registry, bodies, Keys())
    return httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://pod")


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        assert answer.text.endswith("data: [DONE]\n\n") or answer.json()["choices"][0]["finish_reason"]
    else:
        error = answer.json()["error"]
        assert error["message"]
        assert answer.headers["x-request-id"]
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@settings(max_examples=150, deadline=None)
@given(body=bodies)
async def test_any_body_of_json(path: str, body: dict[str, object]) -> None:
    async with client() as http:
        check(await http.post(path, json=body))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=60), cut=st.integers(0, 80), at=st.integers(0, 80))
async def test_any_bytes(path: str, raw: bytes, cut: int, at: int) -> None:
    body = json.dumps({"model": "tiny", "prompt": "hello", "messages": [{"role": "user", "content": "x"}]}).encode()
    async with client() as http:
        for mutated in (raw, body[:at] + raw + body[at:], body[:cut]):
            check(await http.post(path, content=mutated))


@pytest.mark.attack(
    boundary="client",
    attack="any path, method and header",
    outcome="a status below 500, and the next request is served",
)
@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    path=st.text(alphabet="v1/completons.chat%?#_ é", max_size=20),
    header=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
)
async def test_any_path_method_and_header(method: str, path: str, header: str) -> None:
    async with client() as http:
        answer = await http.request(
            method,
            f"/{path.lstrip('/')}",
            headers=dict.fromkeys(("X-Updraft-Capture", "Content-Type", "X-Request-Id", "Authorization"), header),
        )
    assert answer.status_code < 500

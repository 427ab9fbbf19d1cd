"""The official client against the real server: several choices, log-probabilities, JSON, keys and ids."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from tests.support.fake_engine import FakeEngine, alphabet, saying
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import END
from tests.support.wait import until

from updraft_inference.engine import GenerationRequest
from updraft_inference.process import open_engine

KEY = "sk-of-the-test-0123456789"
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path, FakeEngine(max_queued=6)) as pod:
        yield pod


def each_says(pod: RunningPod, *texts: str) -> list[GenerationRequest]:
    """The choices say these, in the order in which the engine gets them; -> the requests."""
    requests: list[GenerationRequest] = []

    def script(request: GenerationRequest) -> Iterator[int]:
        requests.append(request)
        return saying(texts[len(requests) - 1])(request)

    pod.engine.script = script
    return requests


async def test_several_choices_are_requests_with_seeds_of_their_own(pod: RunningPod) -> None:
    requests = each_says(pod, "one", "two", "three")

    answer = await pod.openai.chat.completions.create(model=MODEL, messages=HI, n=3, seed=5)

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(choice.message.content or "" for choice in answer.choices) == ["one", "three", "two"]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert sorted(request.sampling.seed or 0 for request in requests) == [5, 6, 7]
    assert len({request.request_id for request in requests}) == 3
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens == len("onetwothree") + 3
    assert usage.prompt_tokens == len(requests[0].prompt_ids)
    assert await pod.metric('updraft_inference_requests_total{finish="stop"}') == 3


@pytest.mark.parametrize("has_usage", [True, False])
async def test_streamed_choices_come_interleaved_under_one_id(pod: RunningPod, *, has_usage: bool) -> None:
    each_says(pod, "first", "second 🙂")

    stream = await pod.openai.chat.completions.create(
        model=MODEL, messages=HI, n=2, stream=True, stream_options={"include_usage": has_usage}
    )
    chunks = [chunk async for chunk in stream]

    texts, ends = ["", ""], [0, 0]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] += choice.finish_reason == "stop"
    assert sorted(texts) == ["first", "second 🙂"]
    assert ends == [1, 1]
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    num_tokens = len(b"first" + "second 🙂".encode()) + 2
    assert [usage.completion_tokens for usage in usages] == ([num_tokens] if has_usage else [])


@pytest.mark.parametrize("stream", [True, False])
async def test_choices_that_do_not_fit_the_queue_are_refused_together(tmp_path: Path, *, stream: bool) -> None:
    async with running_pod(tmp_path, FakeEngine(num_slots=1, max_queued=1, step_s=0.01)) as pod:
        refused = await pod.complete(n=3, stream=stream)

        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        await until(lambda: pod.engine.load.running + pod.engine.load.queued == 0)
        assert (await pod.complete(n=2)).status_code == 200


async def test_a_client_that_hangs_up_cancels_all_choices(pod: RunningPod) -> None:
    pod.engine.script = alphabet
    pod.engine.go.clear()
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(pod.openai.completions.create(model=MODEL, prompt="p", n=3))
        await until(lambda: pod.engine.load.running + pod.engine.load.queued == 3)
        asking.cancel()

    await pod.counts('updraft_inference_requests_total{finish="cancelled"}', 3)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_chats_log_probabilities_are_of_every_token_but_the_end(pod: RunningPod, *, stream: bool) -> None:
    pod.engine.script = saying("aé")
    body = {"model": MODEL, "messages": HI, "logprobs": True, "top_logprobs": 2, "stream": stream}

    answer = await pod.http.post("/v1/chat/completions", json=body)

    choices = [choice for part in parts(answer.text) for choice in part["choices"]]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["bytes"] for entry in entries] == [[byte] for byte in "aé".encode()]
    assert [entry["logprob"] for entry in entries] == [-0.25] * 3
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in entries] == [[-0.25, -1.25]] * 3


def parts(text: str) -> list[dict[str, Any]]:
    """The JSON of an answer, whole or streamed."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line and line != "data: [DONE]"]
    return [json.loads(line) for line in lines]


async def test_a_completions_log_probabilities_have_the_official_shape(pod: RunningPod) -> None:
    whole = await pod.openai.completions.create(model=MODEL, prompt="abc", max_tokens=4, logprobs=1, n=2)
    plain = await pod.openai.completions.create(model=MODEL, prompt="abc", max_tokens=4)

    for choice in whole.choices:
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens == list(choice.text)
        assert logprobs.text_offset == [0, 1, 2, 3]
        assert logprobs.token_logprobs == [-0.25] * 4
        assert logprobs.top_logprobs == [{char: -0.25} for char in choice.text]
    assert plain.choices[0].logprobs is None


async def test_a_stop_strings_own_tokens_are_counted_in_log_probabilities_and_usage_alike(pod: RunningPod) -> None:
    pod.engine.script = saying("one two three")
    answer = await pod.openai.completions.create(model=MODEL, prompt="p", max_tokens=99, stop=" two", logprobs=0)

    (choice,) = answer.choices
    assert choice.text == "one"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("one two")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("one two")


async def test_what_changes_the_answer_reaches_the_engine(pod: RunningPod) -> None:
    requests = each_says(pod, "x")
    schema: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer"}}}

    await pod.openai.chat.completions.create(
        model=MODEL,
        messages=HI,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": -100},
        response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
        extra_body={"min_p": 0.1, "repetition_penalty": 1.2},
    )

    (request,) = requests
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logit_bias) == (0.1, 1.2, ((65, -100),))
    assert json.loads(request.json_schema or "") == schema


async def test_a_bias_on_no_token_is_refused_by_name(pod: RunningPod) -> None:
    with pytest.raises(openai.BadRequestError, match="token 258 is outside the vocabulary") as caught:
        await pod.openai.completions.create(model=MODEL, prompt="p", logit_bias={"258": 1})
    assert caught.value.param == "logit_bias"


@asynccontextmanager
async def real_pod(folder: Path) -> AsyncIterator[RunningPod]:
    """A tiny model of random weights behind the real engine."""
    config = make_tiny_target(folder / MODEL, seed=3) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": END}))
    async with running_pod(folder, open_engine=open_engine, dtype="float32", max_context=256, drafter="ngram") as pod:
        yield pod


@pytest.mark.parametrize("stream", [True, False])
async def test_a_real_model_answers_with_json(tmp_path: Path, *, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "who": {"enum": ["ann", "bob"]}},
        "required": ["ok", "who"],
        "additionalProperties": False,
    }
    body = {
        "model": MODEL,
        "messages": HI,
        "n": 2,
        "seed": 1,  # of a hundred answers without one, two or three are mostly white space and cut off
        "logprobs": True,
        "max_completion_tokens": 150,
        "stream": stream,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
    }
    async with real_pod(tmp_path) as pod:
        answer = await pod.http.post("/v1/chat/completions", json=body)
        bad = {**body, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}
        refused = await pod.http.post("/v1/chat/completions", json=bad)

    assert answer.status_code == 200, answer.text
    texts = {0: "", 1: ""}
    for part in parts(answer.text):
        for choice in part["choices"]:
            texts[choice["index"]] += (choice.get("message") or choice["delta"]).get("content", "")
    for text in texts.values():
        document = json.loads(text)
        assert set(document) == {"ok", "who"}
        assert document["who"] in {"ann", "bob"}
    assert refused.status_code == 400
    assert "Unimplemented keys" in refused.json()["error"]["message"]


async def test_the_client_that_asks_finds_its_own_request_id(pod: RunningPod) -> None:
    body = {"model": MODEL, "prompt": "p"}
    own = await pod.http.post("/v1/completions", json=body, headers={"X-Request-Id": "trace-7"})
    ours = await pod.http.post("/v1/completions", json=body)
    bad = await pod.http.post("/v1/completions", json=body, headers={"X-Request-Id": "two words"})
    refused = await pod.http.post("/v1/completions", json={}, headers={"X-Request-Id": "trace-8"})
    nothing = await pod.http.get("/v1/nothing")

    assert own.headers.get_list("x-request-id") == ["trace-7"]
    assert own.json()["id"].startswith("cmpl-")
    assert ours.headers["x-request-id"] == ours.json()["id"]
    assert bad.headers["x-request-id"] == bad.json()["id"]
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "trace-8")
    assert nothing.headers["x-request-id"].startswith("req-")


@pytest.mark.attack(
    boundary="client",
    attack="a request without a known API key",
    outcome="401 everywhere except health and metrics",
)
async def test_with_keys_only_who_shows_one_is_answered(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    async with running_pod(tmp_path, api_keys_file=tmp_path / "keys") as pod:
        knowing = pod.openai.with_options(api_key=KEY)
        assert (await knowing.completions.create(model=MODEL, prompt="p")).choices
        assert [model.id async for model in knowing.models.list()] == [MODEL]
        for ask in (pod.openai.models.list(), pod.openai.completions.create(model=MODEL, prompt="p")):
            with pytest.raises(openai.AuthenticationError) as caught:
                await ask
            assert caught.value.code == "invalid_api_key"
            assert caught.value.response.headers["www-authenticate"] == "Bearer"
        for probe in ("/healthz", "/readyz", "/metrics"):
            assert (await pod.http.get(probe)).status_code == 200


async def test_the_engine_hears_which_requests_are_of_the_same_key_and_not_the_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n{KEY}-other\n")
    async with running_pod(tmp_path, api_keys_file=tmp_path / "keys") as pod:
        requests = each_says(pod, "one", "one again", "other")
        for key in (KEY, KEY, f"{KEY}-other"):
            await pod.openai.with_options(api_key=key).completions.create(model=MODEL, prompt="p")

    one, again, other = (request.client for request in requests)
    assert one == again != other
    assert KEY not in one


@pytest.mark.attack(
    boundary="client",
    attack="one key with many concurrent requests",
    outcome="429 beyond its limit; other keys are served",
)
async def test_a_key_that_asks_too_much_at_once_is_told_to_wait(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n{KEY}-other\n")
    async with running_pod(tmp_path, api_keys_file=tmp_path / "keys", max_requests_per_key=1) as pod:
        client: AsyncOpenAI = pod.openai.with_options(api_key=KEY)
        pod.engine.go.clear()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(client.completions.create(model=MODEL, prompt="p"))
            await until(lambda: pod.engine.load.running == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.completions.create(model=MODEL, prompt="p")
            other = tasks.create_task(
                pod.openai.with_options(api_key=f"{KEY}-other").completions.create(model=MODEL, prompt="p")
            )
            await until(lambda: pod.engine.load.running == 2)
            pod.engine.go.set()
        assert first.result().choices
        assert other.result().choices
        assert (await client.completions.create(model=MODEL, prompt="p")).choices
        with pytest.raises(openai.BadRequestError, match="n is 2"):
            await client.completions.create(model=MODEL, prompt="p", n=2)

    assert caught.value.response.headers["retry-after"] == "1"
    assert "already has 1 of at most 1" in caught.value.message

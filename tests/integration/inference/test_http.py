"""The official client against the real server: what OpenAI's API promises, as far as we do."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI
from tests.support.fake_engine import FakeEngine, alphabet, saying
from tests.support.inference import MODEL, RunningPod, running_pod
from tests.support.wait import until

from updraft_inference.engine import CaptureLoss, Drafter, FinishReason, GenerationRequest


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path) as pod:
        yield pod


@pytest.fixture
def client(pod: RunningPod) -> AsyncOpenAI:
    return pod.openai


async def test_the_model_is_listed(client: AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]

    assert [(model.id, model.owned_by) for model in models] == [(MODEL, "updraft")]


async def test_a_completion_has_text_usage_and_how_the_draft_did(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL,
        prompt="abc",
        max_tokens=7,
        temperature=0,
        extra_body={"updraft": {"drafter": "ngram", "lookahead": 1, "domain": "letters"}},
    )

    assert answer.id.startswith("cmpl-")
    assert len(answer.choices[0].text) == 7
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 7, 10)
    assert usage.model_dump()["updraft"] == {
        "drafter": "ngram",
        "draft_version": 0,
        "verify_steps": 4,
        "acceptance_length": 1.5,
        "proposed": 4,
        "accepted": 2,
    }


async def test_without_a_limit_a_completion_has_sixteen_tokens(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="abc")

    assert len(answer.choices[0].text) == 16


async def test_a_stream_says_the_same_as_the_whole_answer(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model=MODEL, prompt="abc", max_tokens=20)
    stream = await client.completions.create(model=MODEL, prompt="abc", max_tokens=20, stream=True)

    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_a_chat_goes_on_to_its_end_token(client: AsyncOpenAI, pod: RunningPod) -> None:
    pod.engine.script = saying("Grüße 🙂")

    answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])

    assert answer.choices[0].message.content == "Grüße 🙂"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("<|start|>user\nhi<|end|>\n<|start|>assistant\n") - 2 * 8 - 6


async def test_a_streamed_chat_never_shows_half_a_character(client: AsyncOpenAI, pod: RunningPod) -> None:
    pod.engine.script = saying("Grüße 🙂 日本")

    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=100,
    )
    chunks = [chunk async for chunk in stream]

    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    texts = [delta.content or "" for delta in deltas]
    assert "".join(texts) == "Grüße 🙂 日本"
    assert not any("\ufffd" in text for text in texts)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("Grüße 🙂 日本".encode()) + 1
    assert "updraft" in chunks[-1].usage.model_dump()


async def test_a_stream_is_events_that_end_with_done(pod: RunningPod) -> None:
    body = {"model": MODEL, "prompt": "p", "max_tokens": 3, "stream": True}
    answer = await pod.http.post("/v1/completions", json=body)

    events = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] in events[0]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]
    assert '"usage"' not in answer.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_before_it_and_frees_the_slot(pod: RunningPod, *, stream: bool) -> None:
    pod.engine.script = saying("one two three" + "." * 100)
    create = pod.openai.completions.create

    if stream:
        chunks = [
            chunk
            async for chunk in await create(model=MODEL, prompt="p", max_tokens=99, stop=[" three", "x"], stream=True)
        ]
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = await create(model=MODEL, prompt="p", max_tokens=99, stop=" three")
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len("one two three")
        assert "updraft" in answer.usage.model_dump()

    assert (text, reason) == ("one two", "stop")
    await until(lambda: pod.engine.load.running == 0)
    await pod.counts('updraft_inference_requests_total{finish="stop"}', 1)


async def test_token_ids_are_a_prompt(client: AsyncOpenAI) -> None:
    text = await client.completions.create(model=MODEL, prompt="abc", max_tokens=5)
    ids = await client.completions.create(model=MODEL, prompt=list(b"abc"), max_tokens=5)

    assert ids.choices[0].text == text.choices[0].text


async def test_sampling_reaches_the_engine(client: AsyncOpenAI, pod: RunningPod) -> None:
    requests: list[GenerationRequest] = []

    def script(request: GenerationRequest) -> Iterator[int]:
        requests.append(request)
        return alphabet(request)

    pod.engine.script = script

    await client.completions.create(
        model=MODEL, prompt="p", temperature=0.5, top_p=0.9, seed=-1, extra_body={"top_k": 5, "ignore_eos": True}
    )
    await client.completions.create(model=MODEL, prompt="p", temperature=1e-9)
    await pod.complete(updraft={"drafter": "none", "lookahead": 0})

    sampling = requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 5, 2**64 - 1)
    assert requests[0].ignore_eos
    assert requests[0].drafter is None
    assert requests[1].sampling.temperature == 0
    assert (requests[2].drafter, requests[2].lookahead) == (Drafter.NONE, 0)


@pytest.mark.parametrize(
    ("path", "fields", "status", "parts"),
    [
        pytest.param("completions", {"model": "other"}, 404, ["'other'", "'tiny'"], id="unknown model"),
        pytest.param(
            "completions", {"model": "x" * 10_000}, 404, [f"'{'x' * 200}'"], id="unknown model of a long name"
        ),
        pytest.param("completions", {"prompt": "x" * 300}, 400, ["256", "300"], id="prompt over the context"),
        pytest.param("completions", {"max_tokens": 10**9}, 400, ["256", str(10**9)], id="absurd limit"),
        pytest.param("completions", {"prompt": ""}, 400, ["empty"], id="empty prompt"),
        pytest.param("completions", {"prompt": [258]}, 400, ["258"], id="unknown token"),
        pytest.param("completions", {"prompt": ["a", "b"]}, 400, ["2 prompts"], id="two prompts"),
        pytest.param("chat/completions", {"messages": []}, 400, ["messages"], id="no messages"),
        pytest.param("chat/completions", {"n": 9}, 400, ["n: ", "8"], id="nine choices"),
    ],
)
async def test_refusals_are_openai_shaped_and_tell_the_numbers(
    pod: RunningPod, path: str, fields: dict[str, object], status: int, parts: list[str]
) -> None:
    prompt = {"prompt": "p"} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    answer = await pod.http.post(f"/v1/{path}", json={"model": MODEL, **prompt, **fields})

    error = answer.json()["error"]
    assert answer.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert all(part in error["message"] for part in parts)
    assert await pod.metric(f'updraft_inference_refusals_total{{status="{status}"}}') == 1


async def test_a_context_that_is_exceeded_has_openais_code(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 300}])

    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


async def test_malformed_json_is_the_clients_mistake(pod: RunningPod) -> None:
    answer = await pod.http.post("/v1/completions", content=b'{"model": ')

    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]["message"]


@pytest.mark.attack(boundary="client", attack="a body of 50 MB", outcome="413 with the limit")
async def test_a_body_of_50_mb_is_refused_with_both_numbers(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(model=MODEL, prompt="x" * 50_000_000)

    assert caught.value.status_code == 413
    assert "50000" in caught.value.message
    assert str(1024 * 1024) in caught.value.message


@pytest.mark.attack(
    boundary="client",
    attack="an endless chunked body without a length",
    outcome="413 as soon as the limit is reached",
)
async def test_a_body_without_a_length_is_counted(pod: RunningPod) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 100_000

    answer = await pod.http.post("/v1/completions", content=chunks())

    assert answer.status_code == 413
    assert "4000000 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/completions", 405), ("POST", "/v2/x", 404)])
async def test_what_is_not_there_is_openai_shaped_too(pod: RunningPod, method: str, path: str, status: int) -> None:
    answer = await pod.http.request(method, path)

    assert answer.status_code == status
    assert answer.json()["error"]["code"] == "unknown_url"


async def test_a_model_without_a_template_completes_but_does_not_chat(tmp_path: Path) -> None:
    async with running_pod(tmp_path, template=None) as pod:
        assert (await pod.complete()).status_code == 200
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            await pod.openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])


async def test_a_full_queue_is_429_with_retry_after(tmp_path: Path) -> None:
    async with running_pod(tmp_path, FakeEngine(num_slots=1, max_queued=1)) as pod:
        pod.engine.go.clear()
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(pod.complete()) for _ in range(2)]
            await until(lambda: pod.engine.load.running + pod.engine.load.queued == 2)
            with pytest.raises(openai.RateLimitError) as caught:
                await pod.openai.completions.create(model=MODEL, prompt="p")
            pod.engine.go.set()

    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "rate_limit_exceeded"
    assert [task.result().status_code for task in waiting] == [200, 200]


async def test_an_engine_that_fails_makes_the_pod_unhealthy(tmp_path: Path) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(Exception, match="engine has failed"), flatten_subgroups=True):
        async with running_pod(tmp_path) as pod:
            pod.engine.is_alive = False
            health = await pod.http.get("/healthz")
            answer = await pod.complete()
            assert (health.status_code, answer.status_code) == (503, 503)
            await until(lambda: False)


class GivesUp(FakeEngine):
    """Ends a request for reasons of its own, as SGLang aborts one."""

    def _reason(self, request: GenerationRequest, output: list[int]) -> FinishReason | None:
        return FinishReason.CANCELLED if len(output) >= 3 else None


async def test_an_answer_that_the_engine_breaks_off_does_not_look_whole(tmp_path: Path) -> None:
    async with running_pod(tmp_path, GivesUp()) as pod:
        whole = await pod.complete()
        streamed = await pod.complete(stream=True)

    assert whole.status_code == 503
    assert "cancelled this request" in whole.json()["error"]["message"]
    assert "cancelled this request" in streamed.text
    assert "[DONE]" not in streamed.text


async def test_metrics_tell_requests_tokens_and_drafts(pod: RunningPod) -> None:
    await pod.complete(max_tokens=7, updraft={"drafter": "ngram", "lookahead": 1})

    assert await pod.metric('updraft_inference_requests_total{finish="length"}') == 1
    assert await pod.metric("updraft_inference_output_tokens_total") == 7
    assert await pod.metric('updraft_inference_verify_steps_total{drafter="ngram"}') == 4
    assert await pod.metric('updraft_inference_accepted_tokens_total{drafter="ngram",position="1"}') == 2
    assert await pod.metric('updraft_inference_proposed_tokens_total{drafter="ngram",position="1"}') == 4
    assert await pod.metric("updraft_inference_inter_token_latency_seconds_count") == 6
    assert await pod.metric("updraft_inference_time_to_first_token_seconds_count") == 1
    pod.engine.capture_losses[CaptureLoss.QUEUE] = 2
    assert await pod.metric('updraft_inference_capture_lost_parts{reason="queue"}') == 2
    assert await pod.metric("updraft_inference_slots") == 2
    assert await pod.metric("updraft_inference_draft_version") == 0

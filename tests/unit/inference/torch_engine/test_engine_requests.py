"""What a request may ask of the torch engine beside a temperature, with any drafter."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
import torch
from tests.support.tiny_target import VOCAB, make_draft, make_tiny_target, save_draft
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.wait import LONG_S
from transformers import LlamaForCausalLM

from updraft_chassis.errors import InvalidInput, Unavailable
from updraft_inference.engine import (
    DraftCheckpoint,
    Drafter,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
)
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

PROMPTS = [tuple(range(3, 8)), tuple(range(40, 97)), (7, 7, 7, 7, 7), tuple(range(300, 320))]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "redder"]}, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, object]] = {
    "penalties": {
        "sampling": SamplingParams(
            temperature=0, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.2, logit_bias=((9, 3.0),)
        )
    },
    "schema": {"sampling": SamplingParams(temperature=0), "json_schema": json.dumps(SCHEMA), "ignore_eos": False},
    "seeded": {"sampling": SamplingParams(temperature=1.0, top_k=20, seed=4, frequency_penalty=0.3)},
}
_ids = count()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(make_tiny_target(tmp_path_factory.mktemp("models") / "target", seed=3))


@pytest.fixture
async def engine(target: Path, tmp_path: Path) -> AsyncIterator[TorchEngine]:
    limits = Limits(num_slots=3, max_context=200, max_lookahead=4)
    options = EngineOptions(limits=limits, dtype=torch.float32, max_queued=500)
    async with TorchEngine.open(target, options) as engine:
        digest = save_draft(make_draft(target, seed=1), tmp_path / "draft")
        await engine.swap(DraftCheckpoint(version=1, folder=tmp_path / "draft", tensors_digest=digest))
        yield engine


async def run(
    engine: TorchEngine, prompt: tuple[int, ...], **fields: object
) -> tuple[FinishedRequest, tuple[TokenLogprob, ...]]:
    wanted: dict[str, object] = {"max_tokens": 36, "ignore_eos": True, **fields}
    request = GenerationRequest(request_id=f"r{next(_ids)}", prompt_ids=prompt, **wanted)  # type: ignore[arg-type]
    logprobs: list[TokenLogprob] = []
    async for delta in engine.generate(request):
        logprobs += delta.logprobs
        assert len(delta.logprobs) == (0 if request.top_logprobs is None else len(delta.token_ids))
        if delta.finished is not None:
            return delta.finished, tuple(logprobs)
    raise AssertionError("the stream ended without its end")


@pytest.mark.parametrize("kind", KINDS)
async def test_output_is_the_same_without_drafts_and_with_any_drafter_and_lookahead(
    engine: TorchEngine, kind: str
) -> None:
    plain = [(await run(engine, p, drafter=Drafter.NONE, **KINDS[kind]))[0].output_ids for p in PROMPTS]
    for drafter in (Drafter.NGRAM, Drafter.EAGLE3, Drafter.HYBRID):
        for lookahead in (1, 4):
            fields: dict[str, object] = {"drafter": drafter, "lookahead": lookahead, **KINDS[kind]}
            ended = await asyncio.gather(*(run(engine, p, **fields) for p in PROMPTS))
            assert [finished.output_ids for finished, _ in ended] == plain
            assert any(step.draft_ids for finished, _ in ended for step in finished.steps)


async def test_penalties_and_bias_change_the_output(engine: TorchEngine) -> None:
    plain, _ = await run(engine, PROMPTS[2], sampling=SamplingParams(temperature=0))
    fewer, _ = await run(engine, PROMPTS[2], sampling=SamplingParams(temperature=0, frequency_penalty=2.0))
    forced, _ = await run(engine, PROMPTS[2], sampling=SamplingParams(temperature=0, logit_bias=((9, 100.0),)))

    assert len(set(fewer.output_ids)) > len(set(plain.output_ids))
    assert set(forced.output_ids) == {9}


async def test_target_log_probs_of_a_trace_are_the_raw_ones_whatever_was_asked_for(
    engine: TorchEngine, target: Path
) -> None:
    finished, _ = await run(engine, PROMPTS[0], drafter=Drafter.EAGLE3, lookahead=3, **KINDS["penalties"])
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    for step in finished.steps:
        ids = [*PROMPTS[0], *finished.output_ids[: step.start], *step.draft_ids]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(ids) - len(step.draft_ids) - 1
        expected = [float(log_probs[first + i, draft]) for i, draft in enumerate(step.draft_ids)]
        assert step.target_log_probs == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("drafter", list(Drafter))
async def test_log_probabilities_are_the_models_own_for_each_token(
    engine: TorchEngine, target: Path, drafter: Drafter
) -> None:
    sampling = SamplingParams(temperature=0.7, top_k=3, seed=1, presence_penalty=1.0)
    finished, logprobs = await run(
        engine, PROMPTS[3], sampling=sampling, drafter=drafter, top_logprobs=3, max_tokens=20
    )

    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPTS[3], *finished.output_ids]])).logits[0]
    log_probs = logits.log_softmax(-1)[len(PROMPTS[3]) - 1 : -1]
    assert [token.token_id for token in logprobs] == list(finished.output_ids)
    assert len(logprobs) == 20
    for token, row in zip(logprobs, log_probs, strict=True):
        values, ids = row.topk(3)
        assert token.log_prob == pytest.approx(float(row[token.token_id]), abs=1e-3)
        assert [token_id for token_id, _ in token.top] == ids.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-3)


@pytest.mark.parametrize("drafter", list(Drafter))
async def test_what_ends_by_itself_is_json_that_the_schema_allows(engine: TorchEngine, drafter: Drafter) -> None:
    async def answer(seed: int) -> FinishedRequest:
        finished, _ = await run(
            engine,
            PROMPTS[seed % 4],
            sampling=SamplingParams(temperature=1.5, seed=seed if seed % 2 else None),
            json_schema=json.dumps(SCHEMA),
            ignore_eos=False,
            max_tokens=140,
            drafter=drafter,
            lookahead=3,
        )
        return finished

    ended = await asyncio.gather(*map(answer, range(16)))
    stopped = [finished for finished in ended if finished.reason is FinishReason.STOP]
    seeded = [finished for finished in stopped if finished.request.sampling.seed is not None]
    assert len(seeded) >= 4, "of eight, which end alike each time; how many of the others do is chance"
    assert {finished.reason for finished in ended} <= {FinishReason.STOP, FinishReason.LENGTH}
    for finished in stopped:
        jsonschema.validate(json.loads(bytes(finished.output_ids[:-1])), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json_schema": '{"type": "nonsense"}'}, "schema cannot be followed: .*nonsense"),
        ({"json_schema": '{"not": {}}'}, "Unimplemented keys"),
        ({"json_schema": "{"}, "cannot be followed"),
        ({"json_schema": '{"$ref": "#"}'}, "cannot be followed: no text continues"),  # found out at the first token
        ({"sampling": SamplingParams(logit_bias=((VOCAB, 1.0),))}, "outside the vocabulary of 512"),
        ({"top_logprobs": VOCAB + 1}, "top_logprobs is 513"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_and_holds_no_place(
    engine: TorchEngine, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        await run(engine, PROMPTS[0], **fields)
    finished, _ = await run(engine, PROMPTS[0], max_tokens=3)
    assert len(finished.output_ids) == 3


async def test_an_answer_that_its_schema_cannot_follow_to_the_end_is_an_error_and_no_answer(
    engine: TorchEngine,
) -> None:
    schema = json.dumps({"type": "string", "pattern": "(.{0,1000}a.{0,1000}){0,1000}"})
    goes_on = SamplingParams(temperature=0, logit_bias=((ord("a"), 100.0),))
    with pytest.raises(InvalidInput, match=r"cannot be followed: .*too many expressions"):
        await run(engine, PROMPTS[0], json_schema=schema, sampling=goes_on, ignore_eos=False, max_tokens=150)


async def test_a_request_that_is_cancelled_while_its_schema_is_read_has_its_end(target: Path) -> None:
    heard: list[FinishedRequest] = []
    limits = Limits(num_slots=1, max_context=200, max_lookahead=1)
    async with TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.float32), heard.append) as engine:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await run(engine, PROMPTS[0], json_schema=json.dumps(SCHEMA))
    assert [end.reason for end in heard] == [FinishReason.CANCELLED]


async def test_a_request_whose_schema_is_read_while_the_engine_stops_is_told(target: Path) -> None:
    limits = Limits(num_slots=1, max_context=200, max_lookahead=1)
    async with TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.float32)) as engine:
        late = asyncio.ensure_future(run(engine, PROMPTS[0], json_schema="{}"))  # noqa: TID251  (outlives the engine)
        await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="stopped"):
        await asyncio.wait_for(late, LONG_S)


async def test_a_model_without_a_tokenizer_follows_no_schema(tmp_path: Path) -> None:
    limits = Limits(num_slots=1, max_context=64, max_lookahead=1)
    folder = make_tiny_target(tmp_path / "bare")
    async with TorchEngine.open(folder, EngineOptions(limits=limits, dtype=torch.float32)) as engine:
        with pytest.raises(InvalidInput, match=r"needs the model's tokenizer.*tokenizer\.json"):
            await run(engine, (1, 2), json_schema="{}", max_tokens=3)


@pytest.mark.parametrize("drafter", [Drafter.NGRAM, Drafter.EAGLE3, Drafter.HYBRID])
async def test_a_context_as_long_as_the_models_is_filled_with_drafts_as_without(
    target: Path, tmp_path: Path, drafter: Drafter
) -> None:
    """Drafts beyond the last position are made and never kept."""
    shutil.copytree(target, tmp_path / "short")
    config = json.loads((target / "config.json").read_text()) | {"max_position_embeddings": 64}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    options = EngineOptions(limits=Limits(num_slots=2, max_context=64, max_lookahead=4), dtype=torch.float32)
    async with TorchEngine.open(tmp_path / "short", options) as engine:
        digest = save_draft(make_draft(tmp_path / "short", seed=1), tmp_path / "draft")
        await engine.swap(DraftCheckpoint(version=1, folder=tmp_path / "draft", tensors_digest=digest))
        wanted: dict[str, object] = {"max_tokens": 40, "sampling": SamplingParams(temperature=0)}
        plain, _ = await run(engine, PROMPTS[1][:24], drafter=Drafter.NONE, **wanted)
        drafted, _ = await run(engine, PROMPTS[1][:24], drafter=drafter, lookahead=4, **wanted)

    assert len(plain.output_ids) == 40
    assert drafted.output_ids == plain.output_ids

    with pytest.raises(InvalidInput, match="a context of 65 exceeds the model's 64 positions"):
        TorchEngine.open(tmp_path / "short", replace(options, limits=replace(options.limits, max_context=65)))

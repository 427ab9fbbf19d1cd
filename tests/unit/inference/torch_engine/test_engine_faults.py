"""A draft that fails, or changes in memory, costs speed and is told; it costs no request."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft

from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_inference.engine import (
    DraftCheckpoint,
    Drafter,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

HEAD, VALUES = "lm_head.weight", "midlayer.self_attn.v_proj.weight"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_tiny_target(tmp_path / "target")


@pytest.fixture(params=[Drafter.EAGLE3, Drafter.HYBRID])
def drafter(request: pytest.FixtureRequest) -> Drafter:
    """All by which a draft model drafts."""
    return Drafter(request.param)


@pytest.fixture
async def engine(target: Path, drafter: Drafter) -> AsyncIterator[TorchEngine]:
    limits = Limits(num_slots=2, max_context=128, max_lookahead=3)
    options = EngineOptions(limits=limits, dtype=torch.float32, drafter=drafter)
    async with TorchEngine.open(target, options) as engine:
        yield engine


def draft(target: Path, version: int, *, wild: str = "") -> DraftCheckpoint:
    """The weights of a wild one are finite, and what comes out of that one is not."""
    network = make_draft(target, seed=version)
    if wild:
        torch.nn.init.constant_(network.get_parameter(wild), 3e38)
    folder = target.parent / str(version)
    return DraftCheckpoint(version=version, folder=folder, tensors_digest=save_draft(network, folder))


async def run(
    engine: TorchEngine,
    name: str,
    temperature: float,
    prompt: tuple[int, ...] = (3, 4, 5),
    lookahead: int | None = None,
) -> FinishedRequest:
    request = GenerationRequest(
        request_id=name,
        prompt_ids=prompt,
        max_tokens=24,
        sampling=SamplingParams(temperature=temperature, seed=1),
        ignore_eos=True,
        lookahead=lookahead,
    )
    (finished,) = [delta.finished async for delta in engine.generate(request) if delta.finished]
    return finished


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wild", [HEAD, VALUES])
async def test_a_draft_that_fails_costs_its_drafts_and_no_request(
    engine: TorchEngine,
    target: Path,
    caplog: pytest.LogCaptureFixture,
    drafter: Drafter,
    temperature: float,
    wild: str,
) -> None:
    plain = await run(engine, "plain", 0.0)
    await engine.swap(draft(target, 1, wild=wild))

    failed = await run(engine, "drafted", temperature, lookahead=3)

    assert (failed.reason, len(failed.output_ids)) == (FinishReason.LENGTH, 24)
    remaining = {Drafter.NGRAM} if drafter is Drafter.HYBRID else set()
    assert {step.drafter for step in failed.steps if step.draft_ids} == remaining
    assert engine.faults == {1: 1}
    assert engine.is_alive
    assert [record.levelno for record in caplog.records if record.message == "Drafting failed"] == [logging.ERROR]
    assert (await run(engine, "greedy", 0.0)).output_ids == plain.output_ids

    await engine.swap(draft(target, 2))
    assert any(step.draft_version == 2 for step in (await run(engine, "again", 1.0)).steps)
    assert engine.faults == {1: 2}, "two requests met it"


@pytest.mark.parametrize("lookahead", [0, 3])
async def test_what_a_failed_draft_left_behind_costs_the_next_one_nothing(
    engine: TorchEngine, target: Path, lookahead: int
) -> None:
    """Its keys and values stand in the slots still, beyond the ends of shorter prompts and as a prefix of like ones."""
    long, other = tuple(range(3, 80)), tuple(range(200, 290))
    await engine.swap(draft(target, 1, wild=VALUES))
    await asyncio.gather(
        run(engine, "a", 0.0, long, lookahead=lookahead), run(engine, "b", 0.0, other, lookahead=lookahead)
    )
    assert set(engine.faults) == {1}
    of_first = engine.faults[1]

    await engine.swap(draft(target, 2))
    short, again = await asyncio.gather(
        run(engine, "c", 1.0, (3, 4, 5), lookahead=3), run(engine, "d", 1.0, (*other, 7), lookahead=3)
    )

    assert engine.faults == {1: of_first}
    for finished in (short, again):
        assert any(step.draft_ids for step in finished.steps)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0), SamplingParams(temperature=1), SamplingParams(temperature=1, seed=3)]
)
@pytest.mark.parametrize("prompt", [(3, 7, 5), (*range(8, 40), 7, *range(8, 300))], ids=["short", "long"])
async def test_a_target_without_finite_logits_ends_that_request_and_no_other(
    tmp_path: Path, sampling: SamplingParams, prompt: tuple[int, ...]
) -> None:
    """Token 7 makes them so; the slot that it was read in serves others after it, also such as begin alike."""
    folder = make_tiny_target(tmp_path / "target", is_tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    limits = Limits(num_slots=2, max_context=400, max_lookahead=3)
    async with TorchEngine.open(folder, EngineOptions(limits=limits, dtype=torch.float32)) as engine:
        await engine.swap(draft(folder, 1))
        plain = await run(engine, "alone", 0.0, lookahead=0)
        asked = GenerationRequest(request_id="bad", prompt_ids=prompt, max_tokens=8, sampling=sampling)

        async def broken() -> None:
            with pytest.raises(Corrupt, match="not finite"):
                await anext(engine.generate(asked))

        beside, _ = await asyncio.gather(run(engine, "beside", 0.0), broken())

        assert beside.output_ids == plain.output_ids
        again = await asyncio.gather(run(engine, "a", 0.0), run(engine, "b", 0.0))
        assert {one.output_ids for one in again} == {plain.output_ids}
        assert engine.faults == {}


def change_what_is_held(engine: TorchEngine) -> None:
    engine._network.fc.weight[0, 0] += 1


def change_what_drafts(engine: TorchEngine) -> None:
    eagle = engine._scheduler.speculation.eagle
    assert eagle is not None
    eagle._served._weights.qkv.weight[0, 0] += 1


def change_what_is_proposed(engine: TorchEngine) -> None:
    eagle = engine._scheduler.speculation.eagle
    assert eagle is not None
    eagle._vocabulary.token_ids[0] += 1


@pytest.mark.parametrize("device", ["graphics card", "cuda:99"])
def test_a_device_that_torch_does_not_have_is_one_sentence(target: Path, device: str) -> None:
    limits = Limits(num_slots=1, max_context=64, max_lookahead=1)
    with pytest.raises(InvalidInput, match=f"UPDRAFT_INFERENCE_DEVICE is '{device}', which torch cannot use here: "):
        TorchEngine.open(target, EngineOptions(limits=limits, device=device))


async def test_swaps_are_proved_with_weights_as_the_kernels_of_a_cpu_read_them(target: Path) -> None:
    limits = Limits(num_slots=2, max_context=128, max_lookahead=3)
    async with TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.bfloat16)) as engine:
        for version in (1, 2, 1):
            held = (await engine.swap(draft(target, version))).loaded
            assert await engine.rehash() == held
            await run(engine, "a", 0.0)
        assert engine.faults == {}


@pytest.mark.parametrize("change", [change_what_is_held, change_what_drafts, change_what_is_proposed])
async def test_a_draft_that_changed_in_memory_is_found(
    engine: TorchEngine, target: Path, change: Callable[[TorchEngine], None]
) -> None:
    held = (await engine.swap(draft(target, 1))).loaded
    with torch.inference_mode():
        change(engine)

    rehashed = await engine.rehash()

    assert rehashed == engine.loaded
    assert rehashed.version == 1
    assert rehashed.tensors_digest != held.tensors_digest

    await engine.swap(draft(target, 1))
    assert engine.loaded == held

"""A draft that fails, or changes in memory, costs speed and is told; it costs no request."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft

from updraft_inference.engine.port import DraftOnDisk, Finished, FinishReason, GenerationRequest, Sampling
from updraft_inference.torch_engine.decoder import Limits
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_tiny_target(tmp_path / "target")


@pytest.fixture
async def engine(target: Path) -> AsyncIterator[TorchEngine]:
    limits = Limits(num_slots=2, max_context=128, max_lookahead=3)
    async with TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.float32)) as engine:
        yield engine


def draft(target: Path, version: int, *, is_wild: bool = False) -> DraftOnDisk:
    """The weights of a wild one are finite, and what comes out of its head is not."""
    network = make_draft(target, seed=version)
    if is_wild:
        torch.nn.init.constant_(network.lm_head.weight, 3e38)
    folder = target.parent / str(version)
    return DraftOnDisk(version=version, folder=folder, tensors_digest=save_draft(network, folder))


async def run(engine: TorchEngine, name: str, temperature: float) -> Finished:
    request = GenerationRequest(
        request_id=name,
        prompt_ids=(3, 4, 5),
        max_tokens=24,
        sampling=Sampling(temperature=temperature, seed=1),
        ignore_eos=True,
    )
    (finished,) = [delta.finished async for delta in engine.generate(request) if delta.finished]
    return finished


async def test_a_draft_that_fails_costs_its_drafts_and_no_request(
    engine: TorchEngine, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = await run(engine, "plain", 0.0)
    await engine.swap(draft(target, 1, is_wild=True))

    failed = await run(engine, "sampled", 1.0)

    assert (failed.reason, len(failed.output_ids)) == (FinishReason.LENGTH, 24)
    assert not any(step.draft_ids for step in failed.steps)
    assert engine.faults == {1: 1}
    assert engine.is_alive
    assert [record.levelno for record in caplog.records if record.message == "A draft failed"] == [logging.ERROR]
    assert (await run(engine, "greedy", 0.0)).output_ids == plain.output_ids

    await engine.swap(draft(target, 2))
    assert any(step.draft_version == 2 for step in (await run(engine, "again", 1.0)).steps)
    assert engine.faults == {1: 1}


async def test_a_draft_that_changed_in_memory_is_found(engine: TorchEngine, target: Path) -> None:
    held = (await engine.swap(draft(target, 1))).loaded
    engine._network.fc.weight[0, 0] += 1

    found = await engine.verify()

    assert found == engine.loaded
    assert found.version == 1
    assert found.tensors_digest != held.tensors_digest

    await engine.swap(draft(target, 1))
    assert engine.loaded == held

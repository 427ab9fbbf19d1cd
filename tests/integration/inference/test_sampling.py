"""What is sampled with a draft is distributed as without one: what every speculative engine promises, by statistics."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft

from updraft_inference.engine.port import Drafter, DraftOnDisk, GenerationRequest, Sampling, VerifyStep
from updraft_inference.torch_engine.decoder import Limits
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine

NUM_SAMPLES = 800
NUM_COMPARED = 3
"""Tokens of each output, counted together."""

Outputs = list[tuple[int, ...]]


async def sample(
    engine: TorchEngine, drafter: Drafter, rounds: range, *, is_seeded: bool
) -> tuple[Outputs, list[VerifyStep]]:
    """One output a round, all of the same prompt, with the verify steps of all."""

    async def run(index: int) -> tuple[tuple[int, ...], tuple[VerifyStep, ...]]:
        wanted = GenerationRequest(
            request_id=f"r{index}",
            prompt_ids=(5, 6),
            max_tokens=4,
            sampling=Sampling(temperature=0.7, top_k=3, seed=index if is_seeded else None),
            ignore_eos=True,
            drafter=drafter,
            lookahead=2,
        )
        finished = [delta.finished async for delta in engine.generate(wanted)][-1]
        assert finished is not None
        return finished.output_ids, finished.steps

    ended = await asyncio.gather(*map(run, rounds))
    return [output for output, _ in ended], [step for _, steps in ended for step in steps]


@pytest.mark.parametrize("is_seeded", [pytest.param(True, id="seeds"), pytest.param(False, id="no seed")])
async def test_sampled_output_has_the_targets_distribution_with_any_draft(tmp_path: Path, *, is_seeded: bool) -> None:
    """Two-sample chi-square over the first three tokens, with a draft of lookahead 2 against none.

    Without a seed (speculative sampling) it has other numbers each time, and would fail by chance once in a million times.
    """
    target = make_tiny_target(tmp_path / "target", seed=3)
    limits = Limits(num_slots=8, max_context=200, max_lookahead=7)
    options = EngineOptions(limits=limits, dtype=torch.float32, max_queued=NUM_SAMPLES)
    async with TorchEngine.open(target, options) as engine:
        without, _ = await sample(engine, Drafter.NONE, range(NUM_SAMPLES), is_seeded=is_seeded)
        # A draft over just the tokens that occur, so that many of its random guesses are kept.
        tokens = torch.tensor(sorted({token for output in without for token in output}))
        digest = save_draft(make_draft(target, token_ids=tokens), tmp_path / "draft")
        await engine.swap(DraftOnDisk(version=1, folder=tmp_path / "draft", tensors_digest=digest))
        others = range(NUM_SAMPLES, 2 * NUM_SAMPLES)
        with_draft, steps = await sample(engine, Drafter.EAGLE3, others, is_seeded=is_seeded)
    assert sum(step.accepted for step in steps) > 50, "kept drafts are what the test is about"
    statistic, degrees = two_sample_chi_square(
        Counter(output[:NUM_COMPARED] for output in with_draft), Counter(output[:NUM_COMPARED] for output in without)
    )
    # Wilson and Hilferty's approximation of the percentile.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.75 * (2 / (9 * degrees)) ** 0.5) ** 3


def two_sample_chi_square(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> tuple[float, int]:
    """Of samples of one size, over outcomes seen at least ten times; with its degrees of freedom."""
    common = [outcome for outcome in one | other if one[outcome] + other[outcome] >= 10]
    assert len(common) > 3
    return sum((one[o] - other[o]) ** 2 / (one[o] + other[o]) for o in common), len(common) - 1

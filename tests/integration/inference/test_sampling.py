"""What is sampled with a draft is distributed as without one: what every speculative engine promises, by statistics."""

import asyncio
import json
from collections import Counter
from itertools import count, cycle, product
from pathlib import Path

import pytest
import torch
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft
from tests.support.tiny_tokenizer import write_tokenizer
from torch import Tensor

from updraft_inference.engine import (
    DraftCheckpoint,
    Drafter,
    FinishedRequest,
    GenerationRequest,
    SamplingParams,
    VerifyStep,
)
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

NUM_SAMPLES, NUM_MIXED = 800, 200
NUM_COMPARED = 3
"""Tokens of each output, counted together."""

Outputs = list[tuple[int, ...]]

OPTIONS = EngineOptions(
    limits=Limits(num_slots=8, max_context=400, max_lookahead=7), dtype=torch.float32, max_queued=4 * NUM_SAMPLES
)
_ids = count()


PROMPT = (5, 6)
LONG = tuple(range(10, 310))
"""Longer than one chunk, and shared."""


def request(prompt: tuple[int, ...] = PROMPT, **fields: object) -> GenerationRequest:
    wanted = {"max_tokens": 4, "sampling": SamplingParams(temperature=0.7, top_k=3), "ignore_eos": True, **fields}
    return GenerationRequest(request_id=f"r{next(_ids)}", prompt_ids=prompt, **wanted)  # type: ignore[arg-type]


async def outputs(engine: TorchEngine, wanted: list[GenerationRequest]) -> tuple[Outputs, list[VerifyStep]]:
    """One output a request, all asked for together, with the verify steps of all."""

    async def run(one: GenerationRequest) -> FinishedRequest:
        (finished,) = [delta.finished async for delta in engine.generate(one) if delta.finished]
        return finished

    ended = await asyncio.gather(*map(run, wanted))
    return [finished.output_ids for finished in ended], [step for finished in ended for step in finished.steps]


def tokens_of(outputs: Outputs) -> Tensor:
    return torch.tensor(sorted({token for output in outputs for token in output}))


def draft_over(tokens: Tensor, target: Path, *, version: int = 1) -> DraftCheckpoint:
    """A draft over just the tokens that occur, so that many of its random guesses are kept."""
    folder = target.parent / str(version)
    digest = save_draft(make_draft(target, token_ids=tokens, seed=version), folder)
    return DraftCheckpoint(version=version, folder=folder, tensors_digest=digest)


@pytest.mark.parametrize("drafter", [Drafter.EAGLE3, Drafter.HYBRID])
@pytest.mark.parametrize("is_seeded", [pytest.param(True, id="seeds"), pytest.param(False, id="no seed")])
async def test_sampled_output_has_the_targets_distribution_with_any_draft(
    tmp_path: Path, *, is_seeded: bool, drafter: Drafter
) -> None:
    """Two-sample chi-square over the first three tokens, with a draft of lookahead 2 against none.

    Without a seed (speculative sampling) it has other numbers each time, and would fail by chance once in a million times.
    """
    target = make_tiny_target(tmp_path / "target", seed=3)

    def wanted(drafter: Drafter, rounds: range) -> list[GenerationRequest]:
        samplings = [SamplingParams(temperature=0.7, top_k=3, seed=index if is_seeded else None) for index in rounds]
        return [request(sampling=sampling, drafter=drafter, lookahead=2) for sampling in samplings]

    async with TorchEngine.open(target, OPTIONS) as engine:
        without, _ = await outputs(engine, wanted(Drafter.NONE, range(NUM_SAMPLES)))
        await engine.swap(draft_over(tokens_of(without), target))
        with_draft, steps = await outputs(engine, wanted(drafter, range(NUM_SAMPLES, 2 * NUM_SAMPLES)))
    assert sum(step.accepted for step in steps) > 50, "kept drafts are what the test is about"
    if drafter is Drafter.HYBRID:
        assert any(step.accepted > index for step in steps for index in step.looked_up), "and kept lookups among them"
    assert_same_distribution(with_draft, without)


async def test_it_has_it_while_drafts_that_share_no_token_take_turns(tmp_path: Path) -> None:
    """As above, without seeds."""
    target = make_tiny_target(tmp_path / "target", seed=3)

    def wanted(drafter: Drafter) -> list[GenerationRequest]:
        return [request(drafter=drafter, lookahead=2) for _ in range(NUM_SAMPLES)]

    async with TorchEngine.open(target, OPTIONS) as engine:
        without, _ = await outputs(engine, wanted(Drafter.NONE))
        tokens = tokens_of(without)
        halves = [tokens[first::2][: len(tokens) // 2] for first in (0, 1)]
        drafts = [draft_over(half, target, version=version) for version, half in enumerate(halves, start=1)]
        await engine.swap(drafts[0])
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(outputs(engine, wanted(Drafter.EAGLE3)))
            for draft in cycle(drafts):
                if running.done():
                    break
                await engine.swap(draft)
        with_drafts, steps = running.result()
    assert sum(step.accepted for step in steps) > 50
    assert {step.draft_version for step in steps if step.accepted} == {1, 2}
    for step in steps:
        assert set(step.draft_ids) <= set(halves[step.draft_version - 1].tolist())
    assert_same_distribution(with_drafts, without)


async def test_it_has_it_in_batches_of_shared_prefixes_chunks_grammars_and_unequal_lengths(tmp_path: Path) -> None:
    """As above, without seeds; each kind of request is compared with itself without drafts, all kinds in one batch."""
    target = write_tokenizer(make_tiny_target(tmp_path / "target", seed=3))
    words = {"enum": ["".join(letters) for letters in product("abc", repeat=3)]}
    warm = SamplingParams(temperature=2.0, top_k=3)
    grammar: dict[str, object] = {"json_schema": json.dumps(words), "ignore_eos": False, "sampling": warm}
    fields: list[dict[str, object]] = [
        {"prompt": (*LONG, 7), "drafter": Drafter.EAGLE3, "lookahead": 2},
        {"prompt": (*LONG, 8), "drafter": Drafter.EAGLE3, "lookahead": 1, **grammar},
        {"prompt": (*LONG, 7, *b'"abc"', 7), "drafter": Drafter.NGRAM, "lookahead": 2, **grammar},
    ]
    kinds = range(len(fields))

    def wanted(others: dict[str, object]) -> list[GenerationRequest]:
        return [request(**{**fields[kind], **others}) for _ in range(NUM_MIXED) for kind in kinds]  # type: ignore[arg-type]

    async with TorchEngine.open(target, OPTIONS) as engine:
        without, _ = await outputs(engine, wanted({"drafter": Drafter.NONE, "lookahead": None}))
        await engine.swap(draft_over(tokens_of(without), target))
        drafted, steps = await outputs(engine, wanted({}))
        assert engine.load.cached_tokens > NUM_MIXED * len(LONG)
    assert sum(step.accepted for step in steps) > 50
    assert {step.drafter for step in steps if step.accepted} == {Drafter.EAGLE3, Drafter.NGRAM}
    assert {len(step.draft_ids) for step in steps} == {0, 1, 2}
    for kind in kinds:
        assert_same_distribution(drafted[kind :: len(fields)], without[kind :: len(fields)])


def assert_same_distribution(one: Outputs, other: Outputs) -> None:
    """Of the tokens that are compared."""
    statistic, degrees = two_sample_chi_square(
        Counter(output[:NUM_COMPARED] for output in one), Counter(output[:NUM_COMPARED] for output in other)
    )
    # Wilson and Hilferty's approximation of the percentile.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.75 * (2 / (9 * degrees)) ** 0.5) ** 3


def two_sample_chi_square(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> tuple[float, int]:
    """Of samples of one size, over outcomes seen at least ten times; with its degrees of freedom."""
    common = [outcome for outcome in one | other if one[outcome] + other[outcome] >= 10]
    assert len(common) > 3
    return sum((one[o] - other[o]) ** 2 / (one[o] + other[o]) for o in common), len(common) - 1

"""A forward over many pieces gives each the rows that it would have got alone, however they are put together."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_target import make_tiny_target

from updraft_inference.engine import GenerationRequest, SamplingParams
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.model.target import Target
from updraft_inference.torch_engine.proposal import Proposal
from updraft_inference.torch_engine.scheduler.forward import ForwardChunk, run_forward
from updraft_inference.torch_engine.sequence import Sequence
from updraft_kernels.loader import Kernels

NUM_SLOTS, NUM_POSITIONS = 9, 96


@pytest.fixture(scope="module")
def target(library: Kernels | None, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = make_tiny_target(tmp_path_factory.mktemp("models") / "target", seed=5)
    return Target.open(folder, dtype=torch.float32, device=torch.device("cpu"), library=library)


def new_cache(target: Target) -> SlotCache:
    c = target.config
    shape = CacheShape(
        num_layers=c.num_layers,
        num_slots=NUM_SLOTS,
        num_positions=NUM_POSITIONS,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
    )
    return SlotCache(shape, like=target.embedding)


def sequence(slot: int, ids: list[int], *, num_prompt: int, num_computed_tokens: int) -> Sequence:
    request = GenerationRequest(
        request_id=str(slot), prompt_ids=tuple(ids[:num_prompt]), max_tokens=50, sampling=SamplingParams(temperature=0)
    )
    return Sequence(request=request, emit=lambda _: None, slot=slot, ids=ids, num_computed_tokens=num_computed_tokens)


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 250) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(
    drafted=st.lists(st.sampled_from([0, 0, 0, 1, 3, 10]), max_size=6),
    prompts=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), max_size=3),
    seed=st.integers(0, 1000),
)
def test_every_piece_gets_the_rows_and_the_verdict_that_it_gets_alone(
    target: Target, drafted: list[int], prompts: list[tuple[int, int]], seed: int
) -> None:
    if not drafted and not prompts:
        return
    rng, cache = random.Random(seed), new_cache(target)
    slots = rng.sample(range(NUM_SLOTS), len(drafted) + len(prompts))
    running, reading = sorted(slots[: len(drafted)]), slots[len(drafted) :]
    drafts, parts = [], []
    for slot, count in zip(running, drafted, strict=True):
        ids = tokens(rng, rng.randint(2, 40))
        mine = sequence(slot, ids, num_prompt=len(ids) - 1, num_computed_tokens=len(ids) - 1)
        proposed = tokens(rng, count)
        drafts.append(ForwardChunk(sequence=mine, ids=[ids[-1], *proposed], proposal=Proposal(ids=proposed)))
    for slot, (before, count) in zip(reading, prompts, strict=True):
        ids = tokens(rng, before + count + rng.choice([0, 5]))
        mine = sequence(slot, ids, num_prompt=len(ids), num_computed_tokens=before)
        parts.append(ForwardChunk(sequence=mine, ids=ids[before : before + count], is_prompt=True))
    for piece in (*drafts, *parts):
        if piece.sequence.num_computed_tokens:
            read = piece.sequence.ids[: piece.sequence.num_computed_tokens]
            target.forward(torch.tensor(read), [cache.batch([piece.sequence.slot], [0], [len(read)])], cache)

    pieces = [*drafts, *parts]
    together = run_forward(target, cache, pieces)
    alone = [run_forward(target, cache, [piece]) for piece in pieces]
    for actual, (expected,) in zip(together, alone, strict=True):
        torch.testing.assert_close(actual.rows.aux, expected.rows.aux, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual.rows.last, expected.rows.last, rtol=1e-4, atol=1e-4)
        assert (actual.result.accepted, actual.result.bonus_id) == (
            expected.result.accepted,
            expected.result.bonus_id,
        )
        assert actual.result.target_log_probs == pytest.approx(expected.result.target_log_probs, abs=1e-3)

"""A chain's tokens have the distribution that verification is told, whoever proposed them."""

from collections import Counter
from collections.abc import Sequence as SequenceOf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from updraft_draft.acceptance import accept_sampled
from updraft_inference.engine import Drafter, GenerationRequest, SamplingParams
from updraft_inference.torch_engine.drafting.chain import Chain, Prediction, Vocabulary
from updraft_inference.torch_engine.drafting.mixture import Chooser, Mixture
from updraft_inference.torch_engine.drafting.ngram_index import LENGTHS, NgramMatch
from updraft_inference.torch_engine.proposal import Proposal, ProposalSource
from updraft_inference.torch_engine.sampling import noise
from updraft_inference.torch_engine.sequence import Sequence

VOCAB, KNOWN = 6, (0, 2, 3, 5)
"""Tokens of the target, and those that the draft model can propose."""
WARM = SamplingParams(temperature=0.8)

Lookups = list[NgramMatch]
matches = st.builds(
    lambda token, n, is_contested, is_from_cache: NgramMatch([token], ProposalSource(n, is_contested, is_from_cache)),
    st.integers(0, VOCAB - 1),
    st.sampled_from(LENGTHS),
    st.booleans(),
    st.booleans(),
)
lookups = st.lists(st.lists(matches, max_size=2), min_size=3, max_size=3)
logits = st.lists(st.lists(st.floats(-4, 4), min_size=4, max_size=4), min_size=3, max_size=3).map(torch.tensor)


def predicted(logits: Tensor) -> Prediction:
    best, index = logits.max(-1)
    return Prediction(logits, int(index), float(best), float(logits.logsumexp(-1)))


def drafted(
    rows: Tensor, found: SequenceOf[Lookups], sampling: SamplingParams, draws: torch.Generator | None = None
) -> Proposal:
    """A chain that was mixed."""
    generator = None if sampling.temperature == 0 else draws or torch.Generator().manual_seed(0)
    request = GenerationRequest(request_id="r", prompt_ids=(1,), max_tokens=9, sampling=sampling)
    sequence = Sequence(request=request, emit=lambda _: None, ids=[1], generator=generator)
    mixture = Mixture(lookups={sequence: lambda chain_ids: found[len(chain_ids)]})
    chain = Chain(sequence, Vocabulary(torch.tensor(KNOWN), VOCAB))
    for row_logits in rows:
        chain.extend(predicted(row_logits), mixture)
    return chain.proposal(mixture)


@given(logits, lookups)
def test_nothing_that_is_drawn_decides_between_model_and_lookup(rows: Tensor, found: list[Lookups]) -> None:
    proposals = [drafted(rows, found, WARM, torch.Generator().manual_seed(n)) for n in range(8)]
    first = proposals[0]
    assert first.q is not None
    for proposal in proposals:
        assert proposal.looked_up == first.looked_up
        assert proposal.q is not None
        assert torch.equal(proposal.q, first.q)


@given(logits, lookups)
def test_each_token_can_come_from_the_distribution_that_is_reported(rows: Tensor, found: list[Lookups]) -> None:
    proposal = drafted(rows, found, WARM)
    assert proposal.q is not None
    assert proposal.q.sum(-1).tolist() == pytest.approx([1.0] * len(proposal.ids), abs=1e-5)
    for index, (token, row) in enumerate(zip(proposal.ids, proposal.q, strict=True)):
        assert row[token] > 0
        if index in proposal.looked_up:
            assert row[token] == 1.0
            assert [token] in [match.ids for match in found[index]]
        else:
            expected = (rows[index] / WARM.temperature).softmax(-1)
            assert torch.equal(row[list(KNOWN)], expected)


@given(logits, lookups)
def test_a_greedy_chain_has_the_likeliest_token_or_a_looked_up_one(rows: Tensor, found: list[Lookups]) -> None:
    proposal = drafted(rows, found, SamplingParams(temperature=0))
    assert proposal.q is None
    for index, token in enumerate(proposal.ids):
        if index in proposal.looked_up:
            assert [token] in [match.ids for match in found[index]]
        else:
            assert token == KNOWN[int(rows[index].argmax())]


@given(logits, lookups, st.integers(0, 99))
def test_a_seeded_chain_has_the_token_that_wins_by_the_noise_or_a_looked_up_one(
    rows: Tensor, found: list[Lookups], seed: int
) -> None:
    proposal = drafted(rows, found, SamplingParams(temperature=0.8, seed=seed))
    for index, token in enumerate(proposal.ids):
        q = torch.zeros(VOCAB).index_put((torch.tensor(KNOWN),), (rows[index] / 0.8).softmax(-1))
        winner = noise.draw(q, seed, index)
        assert token == winner or (index in proposal.looked_up and [token] in [match.ids for match in found[index]])


def test_a_model_that_drafts_alone_by_chance_is_still_compared_with_lookup() -> None:
    request = GenerationRequest(request_id="r", prompt_ids=(1,), max_tokens=9, sampling=SamplingParams(temperature=0))
    sequence = Sequence(request=request, emit=lambda _: None, ids=[1])
    lookups = {sequence: lambda _chain_ids: [NgramMatch([4], ProposalSource(8))]}
    for alone, token, drafter in ((frozenset(), 4, Drafter.HYBRID), (frozenset([sequence]), 0, Drafter.EAGLE3)):
        chain = Chain(sequence, Vocabulary(torch.tensor(KNOWN), VOCAB))
        mixture = Mixture(Chooser(), lookups, alone)
        chain.extend(predicted(torch.tensor([1.0, 0.0, 0.0, 0.0])), mixture)
        proposal = chain.proposal(mixture)
        assert (proposal.ids, proposal.drafter) == ([token], drafter)
        assert [offer.token_id for offer in proposal.places[0].offers] == [0, 4]


def test_a_chain_that_nothing_is_mixed_into_is_the_models() -> None:
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert drafted(rows, [[], [], []], WARM).looked_up == ()
    request = GenerationRequest(request_id="r", prompt_ids=(1,), max_tokens=9)
    alone = Chain(Sequence(request=request, emit=lambda _: None, ids=[1]), Vocabulary(torch.tensor(KNOWN), VOCAB))
    assert alone.proposal(Mixture()).drafter is Drafter.EAGLE3


def test_sampling_with_mixed_chains_has_the_targets_distribution() -> None:
    """Chi-square against the exact probabilities of the first three tokens. One place is the model's, one a lookup's inside of
    the draft vocabulary, one a lookup's outside of it."""
    num, generator = 5_000, torch.Generator().manual_seed(7)
    draft_logits = torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.2], [0.1, 0.0, 0.3, 0.0]])
    found = [
        [NgramMatch([1], ProposalSource(1, is_contested=True))],
        [NgramMatch([3], ProposalSource(8))],
        [NgramMatch([4], ProposalSource(8)), NgramMatch([0], ProposalSource(1))],
    ]
    target = (0.4 * torch.randn(4, VOCAB, generator=generator)).softmax(-1)  # of each place, whatever came before
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(num):
        proposal = drafted(draft_logits, found, WARM, generator)
        outcome = accept_sampled(target, proposal.ids, proposal.q, generator)
        output = [*proposal.ids[: outcome.count], outcome.bonus_id]
        while len(output) < 3:  # plain steps
            output.append(int(torch.multinomial(target[len(output)], 1, generator=generator)))
        seen[tuple(output[:3])] += 1
    assert proposal.looked_up == (1, 2)
    expected = torch.einsum("a,b,c->abc", *target[:3]).flatten() * num
    observed = torch.tensor([seen[a, b, c] for a in range(VOCAB) for b in range(VOCAB) for c in range(VOCAB)])
    assert float(expected.min()) > 5
    statistic, degrees = float(((observed - expected) ** 2 / expected).sum()), VOCAB**3 - 1
    assert statistic < degrees + 4.75 * (2 * degrees) ** 0.5

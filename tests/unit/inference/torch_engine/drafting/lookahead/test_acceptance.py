"""What is known of a proposal's positions fades, and is shared where a sequence has few observations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.lookahead.acceptance import (
    POSITIONS,
    AcceptanceEstimator,
    AcceptanceTable,
    PendingMatch,
    Score,
    SequenceStats,
)
from updraft_inference.torch_engine.proposal import CHAIN_ALONE, ProposalSource

chains = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40)
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def table(shared: list[tuple[int, bool]], own: list[tuple[int, bool]]) -> tuple[AcceptanceTable, SequenceStats]:
    """A sequence with its own observations, after those of others."""
    known, stats = AcceptanceTable(), SequenceStats()
    for accepted, is_rejected in shared:
        known.observe(SequenceStats(), CHAIN_ALONE, accepted, is_rejected=is_rejected)
    for accepted, is_rejected in own:
        known.observe(stats, CHAIN_ALONE, accepted, is_rejected=is_rejected)
    return known, stats


@given(chains, chains, st.integers(0, 16))
def test_longer_proposals_never_survive_more_often(
    own: list[tuple[int, bool]], shared: list[tuple[int, bool]], n: int
) -> None:
    known, stats = table(shared, own)
    alive = known.survival(stats, CHAIN_ALONE, n)
    assert len(alive) == n
    assert alive == sorted(alive, reverse=True)
    assert all(0 < probability < 1 for probability in alive)


def test_a_sequence_without_observations_uses_the_others() -> None:
    known, stats = table([(3, True)] * 200, [])
    alive = known.survival(stats, CHAIN_ALONE, 4)
    assert alive[2] > 0.9
    assert alive[3] < 0.05


def test_acceptance_of_greedy_requests_promises_nothing_to_sampled_ones() -> None:
    known, _ = table([(5, False)] * 200, [])
    greedy, sampled = (known.survival(SequenceStats(is_sampled=one), CHAIN_ALONE, 3) for one in (False, True))
    unknown, _ = table([], [])
    assert min(greedy) > 0.9
    assert sampled == unknown.survival(SequenceStats(), CHAIN_ALONE, 3)


def test_a_sequence_comes_to_use_its_own_observations() -> None:
    known, stats = table([(3, False)] * 200, [(0, True)] * 40)
    assert known.survival(stats, CHAIN_ALONE, 1)[0] < 0.15


def test_old_observations_fade() -> None:
    estimator = AcceptanceEstimator(50.0)
    for _ in range(1000):
        estimator.observe(0, is_rejected=True)
    for _ in range(100):
        estimator.observe(1, is_rejected=False)
    assert estimator.rates([0.5] * POSITIONS, 1.0)[0] > 0.85
    assert estimator.num_observed(0) <= 50.0


def test_late_positions_share_one_rate() -> None:
    known, stats = table([(POSITIONS + 5, True)] * 20, [])
    alive = known.survival(stats, CHAIN_ALONE, POSITIONS + 20)
    last = alive[POSITIONS - 1] / alive[POSITIONS - 2]
    assert alive[-1] == pytest.approx(alive[POSITIONS - 1] * last**20)


def test_another_draft_model_inherits_no_observations() -> None:
    known, stats = table([(0, True)] * 200, [])
    known.count(Drafter.EAGLE3, stats, CHAIN_ALONE)
    known.reset_chains()
    assert known.num_chains(is_sampled=False) == 0
    assert math.isnan(known.recent(Drafter.EAGLE3, 1))
    assert known.survival(stats, CHAIN_ALONE, 1)[0] == pytest.approx(0.5)


@given(tokens, tokens, st.integers(1, 4))
def test_a_match_is_scored_by_the_tokens_that_came_however_many_at_once(
    proposed: list[int], came: list[int], step: int
) -> None:
    pending, scores = PendingMatch(), list[Score]()
    pending.watch(proposed, ProposalSource(3))
    for start in range(0, len(came), step):
        scores += [score] if (score := pending.score(came[start : start + step])) else []
    accepted = next((i for i, pair in enumerate(zip(proposed, came, strict=False)) if pair[0] != pair[1]), None)
    if accepted is not None:
        assert scores == [Score(ProposalSource(3), accepted, is_rejected=True)]
    else:
        complete = [Score(ProposalSource(3), len(proposed), is_rejected=False)]
        assert scores == (complete if len(proposed) <= len(came) else [])


def test_one_match_is_watched_at_a_time() -> None:
    pending = PendingMatch()
    pending.watch([1, 2], ProposalSource(2))
    pending.watch([9, 9], ProposalSource(5))
    assert pending.score([1]) is None
    assert pending.score([2]) == Score(ProposalSource(2), 2, is_rejected=False)
    assert pending.score([9]) is None

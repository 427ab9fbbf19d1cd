"""Lookup proposes what followed the last time, and nothing when there was no such time."""

from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.ngram_index import NgramIndex, NgramMatch
from updraft_inference.torch_engine.proposal import ProposalSource


def test_what_followed_the_same_tokens_is_proposed() -> None:
    assert NgramIndex().propose([1, 2, 3, 4, 5, 1, 2, 3], 2).ids == [4, 5]


def test_the_latest_occurrence_counts() -> None:
    assert NgramIndex().propose([1, 2, 7, 1, 2, 8, 1, 2], 1).ids == [8]


def test_a_guess_is_told_apart_where_another_token_followed_the_time_before() -> None:
    assert NgramIndex().propose([1, 2, 7, 4, 1, 2], 1).source == ProposalSource(2)
    assert NgramIndex().propose([1, 2, 7, 1, 2, 8, 1, 2], 1).source == ProposalSource(2, is_contested=True)
    assert NgramIndex().propose([1, 2, 7, 1, 2, 8, 5, 1, 2, 8, 6, 1, 2], 1).source == ProposalSource(2)


def test_one_token_is_looked_up_where_nothing_longer_is_known() -> None:
    assert NgramIndex().propose([1, 7, 2, 1], 1) == NgramMatch([7], ProposalSource(1))
    assert NgramIndex().propose([1, 7, 2, 1, 8, 2, 3, 1], 1) == NgramMatch([8], ProposalSource(1, is_contested=True))


def test_nothing_is_proposed_for_tokens_never_seen() -> None:
    assert NgramIndex().propose([1, 2, 3, 4, 5], 3).ids == []


def test_a_repetition_is_continued_beyond_its_end() -> None:
    assert NgramIndex().propose([9, 1, 2, 1, 2], 5).ids == [1, 2, 1, 2, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6))
def test_growing_the_index_token_by_token_gives_what_a_fresh_one_gives(ids: list[int], k: int) -> None:
    grown = NgramIndex()
    for end in range(1, len(ids) + 1):
        proposal = grown.propose(ids[:end], k)
        assert proposal == NgramIndex().propose(ids[:end], k)
        assert len(proposal.ids) in (0, k)

"""A cache proposes what followed in an answer that it remembers, and its memory is bounded."""

from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.answer_cache import AnswerCache
from updraft_inference.torch_engine.drafting.ngram_index import LENGTHS, NOTHING, NgramMatch
from updraft_inference.torch_engine.proposal import ProposalSource


def remembering(*answers: list[int], num_tokens: int = 1024) -> AnswerCache:
    cache = AnswerCache(num_tokens)
    for answer in answers:
        cache.add(answer, 0, len(answer))
    return cache


def test_what_followed_the_longest_known_end_is_proposed() -> None:
    cache = remembering([1, 2, 3, 4, 5, 6], [9, 3, 7])

    assert cache.look_up([8, 1, 2, 3], 2) == NgramMatch([4, 5], ProposalSource(3, is_from_cache=True))
    assert cache.look_up([8, 8, 3], 2) == NgramMatch([7], ProposalSource(1, is_contested=True, is_from_cache=True))
    assert cache.look_up([8], 2) == NOTHING


def test_the_latest_answer_counts_and_tells_if_the_one_before_went_on_otherwise() -> None:
    assert remembering([1, 2, 7], [1, 2, 7]).look_up([1, 2], 1) == NgramMatch(
        [7], ProposalSource(2, is_from_cache=True)
    )
    assert remembering([1, 2, 7], [1, 2, 8]).look_up([1, 2], 1) == NgramMatch(
        [8], ProposalSource(2, is_contested=True, is_from_cache=True)
    )
    assert remembering([1, 2, 7], [1, 2, 8], [1, 2, 8]).look_up([1, 2], 1) == NgramMatch(
        [8], ProposalSource(2, is_from_cache=True)
    )


def test_nothing_goes_on_from_one_answer_to_the_next() -> None:
    assert remembering([1, 2, 3], [4, 5, 6]).look_up([1, 2], 5).ids == [3]
    assert remembering([1, 2, 3], [4, 5, 6]).look_up([2, 3], 5).ids == []


def test_a_prompt_leads_into_its_answer_and_is_not_proposed() -> None:
    cache = AnswerCache(1024)
    cache.add([*range(20), 50, 51], 20, 22)

    assert cache.look_up(list(range(20)), 2) == NgramMatch([50, 51], ProposalSource(8, is_from_cache=True))
    assert cache.look_up([5, 6, 7], 2).ids == []


def test_what_comes_after_a_portion_only_goes_on_from_it() -> None:
    cache = AnswerCache(1024)
    cache.add([1, 2, 3, 4, 5, 6], 0, 3)

    assert cache.look_up([1, 2], 4).ids == [3, 4, 5, 6]
    assert cache.look_up([4, 5], 4).ids == []


def test_only_a_longer_match_than_asked_for_is_looked_up() -> None:
    cache = remembering([1, 2, 3, 4, 5])

    assert cache.look_up([1, 2, 3], 1, longer_than=2) == NgramMatch([4], ProposalSource(3, is_from_cache=True))
    assert cache.look_up([1, 2, 3], 1, longer_than=3).ids == []


def test_what_is_written_over_is_forgotten() -> None:
    cache = remembering([1, 2, 3], num_tokens=32)
    for token in range(100, 130):
        cache.add([token, token + 1], 0, 2)

    assert cache.look_up([1, 2], 1).ids == []
    assert cache.look_up([129], 1).ids == [130]


def test_of_an_answer_longer_than_its_place_the_end_is_kept() -> None:
    cache = remembering(list(range(500)), num_tokens=64)

    assert cache.look_up([490, 491], 3).ids == [492, 493, 494]
    assert cache.look_up([100, 101], 3).ids == []


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 12)), max_size=12),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.integers(1, 6),
    st.sampled_from([2, 16, 64, 1024]),
)
def test_whatever_is_proposed_followed_the_same_tokens_in_an_answer(
    texts: list[tuple[list[int], int]], ids: list[int], k: int, num_tokens: int
) -> None:
    cache = AnswerCache(num_tokens)
    for text, num_before in texts:
        cache.add(text, min(num_before, len(text)), len(text))

    match = cache.look_up(ids, k)

    n = match.source.num_matched
    assert (n in LENGTHS and 1 <= len(match.ids) <= k) if match.ids else n == 0
    assert not match.ids or any(
        text[end - n : end] == ids[-n:] and text[end : end + len(match.ids)] == match.ids
        for text, num_before in texts
        for end in range(max(n, num_before), len(text))
    )

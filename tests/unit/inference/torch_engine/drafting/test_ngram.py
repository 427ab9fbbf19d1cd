"""Lookups take the longer match, and tell no client what another one was answered."""

from itertools import count

from updraft_inference.engine import Drafter, GenerationRequest
from updraft_inference.torch_engine.drafting.ngram import MOST_CLIENTS, MOST_UNREAD, PORTION, NgramProposer
from updraft_inference.torch_engine.drafting.ngram_index import NgramMatch
from updraft_inference.torch_engine.proposal import ProposalSource
from updraft_inference.torch_engine.sequence import Sequence

_names = count()


def sequence(prompt: list[int], answer: list[int], client: str = "") -> Sequence:
    asked = GenerationRequest(request_id=str(next(_names)), prompt_ids=tuple(prompt), max_tokens=100, client=client)
    return Sequence(request=asked, emit=lambda _: None, ids=[*prompt, *answer])


def remembering(*sequences: Sequence, num_tokens: int = 1024) -> NgramProposer:
    lookups = NgramProposer(num_tokens)
    for each in sequences:
        lookups.finish(each)
        lookups.keep_up()
    return lookups


def proposed(lookups: NgramProposer, one: Sequence, k: int) -> NgramMatch:
    proposal = lookups.propose(one, k)
    assert proposal.drafter is (Drafter.NGRAM if proposal.ids else Drafter.NONE)
    assert len(proposal.log_probs) == len(proposal.ids)
    return NgramMatch(proposal.ids, proposal.source)


def test_the_longer_match_is_taken_and_the_requests_own_of_two_as_long() -> None:
    lookups = remembering(sequence([1], [2, 3, 60]))

    assert proposed(lookups, sequence([3, 50, 9, 1, 2], [3]), 1) == NgramMatch(
        [60], ProposalSource(3, is_from_cache=True)
    )
    assert proposed(lookups, sequence([1, 2, 3, 50, 9, 1, 2], [3]), 1) == NgramMatch([50], ProposalSource(3))
    assert proposed(lookups, sequence([7, 1, 2, 3, 50, 9, 8, 1, 2], [3]), 1) == NgramMatch([50], ProposalSource(3))


def test_no_client_is_proposed_what_another_one_was_answered() -> None:
    lookups = remembering(sequence([1], [2, 3, 4], "a"))

    assert proposed(lookups, sequence([1], [2, 3], "a"), 1).ids == [4]
    assert proposed(lookups, sequence([1], [2, 3], "b"), 1).ids == []
    assert proposed(lookups, sequence([1], [2, 3]), 1).ids == []


def test_who_asked_nothing_for_longest_is_forgotten_for_a_new_client() -> None:
    lookups = remembering(*(sequence([1], [2, 3], str(n)) for n in range(MOST_CLIENTS)))
    assert proposed(lookups, sequence([1], [2], "0"), 1).ids == [3]
    lookups.finish(sequence([1], [2, 3], "new"))
    lookups.keep_up()

    known = [
        client
        for client in (*map(str, range(MOST_CLIENTS)), "new")
        if proposed(lookups, sequence([1], [2], client), 1).ids
    ]
    assert known == [str(n) for n in range(MOST_CLIENTS) if n != 1] + ["new"]


def test_without_room_nothing_is_remembered() -> None:
    assert proposed(remembering(sequence([1], [2, 3]), num_tokens=0), sequence([1], [2]), 1).ids == []


def test_a_request_without_an_answer_leaves_nothing() -> None:
    assert proposed(remembering(sequence([1, 2, 3], [])), sequence([1], [2]), 1).ids == []


def test_a_long_answer_is_read_in_portions_and_known_as_a_whole_in_the_end() -> None:
    answer = list(range(10, 10 + 3 * PORTION))
    lookups = remembering(sequence([1], answer), num_tokens=65536)
    assert proposed(lookups, sequence([1], answer[:5]), 16).ids == answer[5:21]
    assert proposed(lookups, sequence([1], answer[: PORTION + 5]), 16).ids == []

    for _ in range(2):
        lookups.keep_up()
    for end in range(1, len(answer)):
        assert proposed(lookups, sequence([1], answer[:end]), 16).ids == answer[end : end + 16]


def test_of_too_many_answers_that_end_at_once_the_latest_are_remembered() -> None:
    lookups = NgramProposer(65536)
    for token in range(100, 100 + 2 * MOST_UNREAD):
        lookups.finish(sequence([1], [token, token + 1000]))
    for _ in range(2 * MOST_UNREAD):
        lookups.keep_up()

    assert proposed(lookups, sequence([1], [99 + 2 * MOST_UNREAD]), 1).ids == [1099 + 2 * MOST_UNREAD]
    assert proposed(lookups, sequence([2], [100]), 1).ids == []

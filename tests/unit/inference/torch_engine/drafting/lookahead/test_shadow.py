"""A proposal is scored against what came, however many tokens came at once."""

from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.lookahead.kind import ProposalSource
from updraft_inference.torch_engine.drafting.lookahead.shadow import Score, Shadow

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@given(tokens, tokens, st.integers(1, 4))
def test_the_score_is_that_of_the_whole_text(proposed: list[int], came: list[int], step: int) -> None:
    shadow, scores = Shadow(), list[Score]()
    shadow.take(proposed, ProposalSource(3))
    for start in range(0, len(came), step):
        scores += [score] if (score := shadow.score(came[start : start + step])) else []
    kept = next((i for i, pair in enumerate(zip(proposed, came, strict=False)) if pair[0] != pair[1]), None)
    if kept is not None:
        assert scores == [Score(ProposalSource(3), kept, is_refused=True)]
    else:
        assert scores == (
            [Score(ProposalSource(3), len(proposed), is_refused=False)] if len(proposed) <= len(came) else []
        )


def test_one_proposal_is_watched_at_a_time() -> None:
    shadow = Shadow()
    shadow.take([1, 2], ProposalSource(2))
    shadow.take([9, 9], ProposalSource(5))
    assert shadow.score([1]) is None
    assert shadow.score([2]) == Score(ProposalSource(2), 2, is_refused=False)
    assert shadow.score([9]) is None

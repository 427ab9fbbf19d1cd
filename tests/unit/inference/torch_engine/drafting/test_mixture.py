"""Where the draft model and lookups offer different tokens, the one that was right more often is taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.mixture import MEMORY, Chooser
from updraft_inference.torch_engine.drafting.ngram_index import LENGTHS
from updraft_inference.torch_engine.proposal import CHAIN_ALONE, Offer, Place, Proposal, ProposalSource

MODEL, LOOKUP, OTHER = 1, 2, 3
"""Tokens."""

sources = st.builds(ProposalSource, st.sampled_from(LENGTHS), st.booleans(), st.booleans())
offers = st.builds(Offer, st.integers(0, 3), sources, st.floats(0, 1))
own_offers = st.builds(Offer, st.integers(0, 3), st.just(CHAIN_ALONE), st.floats(0, 1))
places = st.builds(
    lambda own, lookups, is_sampled, is_drawn: Place([own, *lookups], is_sampled, is_sampled and is_drawn),
    own_offers,
    st.lists(offers, min_size=1, max_size=2),
    st.booleans(),
    st.booleans(),
).filter(lambda place: len({offer.token_id for offer in place.offers}) > 1)


def disputed(q: float = 0.6, *lookups: tuple[int, int], is_drawn: bool = False) -> Place:
    """The model offers MODEL; each lookup offers a token after a match of so many tokens."""
    looked_up = [
        Offer(token, ProposalSource(n), q if token == MODEL else 0.01) for token, n in lookups or [(LOOKUP, 3)]
    ]
    return Place([Offer(MODEL, CHAIN_ALONE, q), *looked_up], is_sampled=is_drawn, is_drawn=is_drawn)


def learn(chooser: Chooser, place: Place, chain_id: int, target_id: int) -> None:
    """The chain had `chain_id` at a place that was verified."""
    is_accepted = chain_id == target_id
    chooser.learn(Proposal(ids=[chain_id], places={0: place}), int(is_accepted), 9 if is_accepted else target_id)


def taken(chooser: Chooser, place: Place) -> int:
    """The token."""
    return place.offers[chooser.take(place)].token_id


@pytest.mark.parametrize("right", [MODEL, LOOKUP])
@pytest.mark.parametrize("q", [0.05, 0.6, 0.95])
def test_the_proposer_that_was_right_is_taken_and_a_change_is_noticed(right: int, q: float) -> None:
    chooser = Chooser()
    for _ in range(30):
        learn(chooser, disputed(q), MODEL, MODEL + LOOKUP - right)
    for _ in range(60):
        learn(chooser, disputed(q), MODEL, right)
    assert taken(chooser, disputed(q)) == right


def test_before_anything_is_known_long_matches_beat_doubtful_drafts_and_sure_drafts_beat_short_matches() -> None:
    chooser = Chooser()
    assert taken(chooser, disputed(0.3, (LOOKUP, 8))) == LOOKUP
    assert taken(chooser, disputed(0.95, (LOOKUP, 1))) == MODEL
    for n in LENGTHS:
        assert chooser.take(disputed(0.5, (LOOKUP, n))) in {0, 1}


def test_two_proposers_that_agree_are_believed_more_than_one_that_is_as_sure() -> None:
    chooser = Chooser()
    assert taken(chooser, disputed(0.5, (LOOKUP, 3))) == LOOKUP
    assert taken(chooser, disputed(0.5, (MODEL, 3), (LOOKUP, 3))) == MODEL


def test_a_token_that_the_draft_model_offers_too_is_its_own() -> None:
    assert Chooser().take(disputed(0.01, (OTHER, 1), (MODEL, 8))) == 0


def test_what_was_learned_about_a_draft_is_forgotten_with_it_and_what_was_learned_about_lookup_is_not() -> None:
    chooser, unknown = Chooser(), Chooser()
    for _ in range(100):
        learn(chooser, disputed(0.6, (LOOKUP, 1)), MODEL, LOOKUP)
    chooser.reset_model()
    weak = Place([Offer(MODEL, CHAIN_ALONE, 0.9), Offer(LOOKUP, ProposalSource(1), 0.2)])
    assert taken(unknown, weak) == MODEL
    assert taken(chooser, weak) == LOOKUP, "lookups of this length were right, next to whatever draft"
    for _ in range(100):
        learn(unknown, disputed(0.9, (LOOKUP, 8)), MODEL, MODEL)
    strong = disputed(0.9, (OTHER, 5))
    assert taken(unknown, strong) == MODEL
    unknown.reset_model()
    assert taken(unknown, strong) == OTHER, "a draft that was often right has been replaced"


def test_a_token_that_was_never_drawn_says_nothing_about_the_draft_model() -> None:
    place = disputed(0.6, (LOOKUP, 3), is_drawn=True)
    place.taken = 1
    chooser = Chooser()
    before = taken(chooser, disputed(0.6, (LOOKUP, 3), is_drawn=True))
    for _ in range(100):
        learn(chooser, place, LOOKUP, OTHER)  # lookup was wrong, and so was the model's likeliest token
    assert before == LOOKUP
    assert taken(chooser, disputed(0.6, (LOOKUP, 3), is_drawn=True)) == MODEL


def test_a_drawn_token_is_judged_by_whether_it_was_accepted_not_by_whether_it_was_likeliest() -> None:
    chooser = Chooser()
    for _ in range(100):
        learn(chooser, disputed(0.2, (LOOKUP, 8), is_drawn=True), OTHER, OTHER)
    assert taken(chooser, disputed(0.2, (LOOKUP, 8), is_drawn=True)) == MODEL


def test_places_after_a_rejection_teach_nothing() -> None:
    chooser = Chooser()
    before = taken(chooser, disputed())
    for _ in range(100):
        places = {1: disputed(), 2: disputed()}
        chooser.learn(Proposal(ids=[OTHER, MODEL, MODEL], places=places), 0, LOOKUP)
    assert before == taken(chooser, disputed()) == LOOKUP
    for _ in range(100):
        chooser.learn(Proposal(ids=[OTHER, MODEL, LOOKUP], places=places), 1, MODEL)
    assert taken(chooser, disputed()) == MODEL


@given(places, st.lists(st.tuples(places, st.integers(0, 3)), max_size=20))
def test_a_choice_is_an_offer_and_a_function_of_what_was_learned(
    place: Place, history: list[tuple[Place, int]]
) -> None:
    choosers = Chooser(), Chooser()
    for chooser in choosers:
        for seen, target_id in history:
            learn(chooser, seen, seen.offers[0].token_id, target_id)
    first, second = (chooser.take(place) for chooser in choosers)
    assert first == second
    assert 0 <= first < len(place.offers)
    assert first == 0 or place.offers[first].token_id != place.offers[0].token_id


def test_old_places_are_outweighed_by_as_many_new_ones_as_are_remembered() -> None:
    chooser = Chooser()
    for _ in range(20 * int(MEMORY)):
        learn(chooser, disputed(), MODEL, LOOKUP)
    for _ in range(int(MEMORY)):
        learn(chooser, disputed(), MODEL, MODEL)
    assert taken(chooser, disputed()) == MODEL

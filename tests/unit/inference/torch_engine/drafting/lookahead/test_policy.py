"""The choice yields most tokens per second by what is known; none of it depends on time."""

import math
from itertools import accumulate, product
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.lookahead.policy import (
    MARGIN,
    DraftChoice,
    DraftOptions,
    StepCosts,
    choose,
)

rates = st.lists(st.floats(0, 1), max_size=4)
survivals = rates.map(lambda conditional: list(accumulate(conditional, mul)))
options = st.builds(DraftOptions, survivals, survivals)
lookups = st.builds(DraftOptions, survivals)
prices = st.tuples(st.floats(0.01, 1), st.floats(0, 0.2), st.floats(0, 0.2))


def costs(price: tuple[float, float, float]) -> StepCosts:
    fixed, row, drafted = price
    return StepCosts(
        [fixed + row * rows for rows in range(40)], lambda sequences, length: drafted * length * (sequences > 0)
    )


def survival(option: DraftOptions, choice: DraftChoice) -> float:
    """Drafts that should be accepted."""
    alive = option.chain if choice.drafter is Drafter.EAGLE3 else option.ngram
    return sum(alive[: choice.length])


def speed(asked: list[DraftOptions], choices: list[DraftChoice], price: StepCosts) -> float:
    """Tokens per second of a choice, from the definition."""
    tokens = sum(1 + survival(option, choice) for option, choice in zip(asked, choices, strict=True))
    rows = sum(1 + choice.length for choice in choices)
    chains = [choice.length for choice in choices if choice.drafter is Drafter.EAGLE3]
    return tokens / (price.verify[rows] + (price.chain(len(chains), max(chains)) if chains else 0.0))


def every(option: DraftOptions) -> list[DraftChoice]:
    return [
        DraftChoice(),
        *(DraftChoice(Drafter.NGRAM, n) for n in range(1, len(option.ngram) + 1)),
        *(DraftChoice(Drafter.EAGLE3, n) for n in range(1, len(option.chain) + 1)),
    ]


@given(st.one_of(lookups, st.builds(DraftOptions, chain=survivals)), prices)
def test_for_one_sequence_with_one_proposer_nothing_is_better(
    option: DraftOptions, price: tuple[float, float, float]
) -> None:
    chosen = choose([option], costs(price)).choices
    best = max(speed([option], [other], costs(price)) for other in every(option))
    assert speed([option], chosen, costs(price)) * MARGIN >= best * (1 - 1e-9)


@given(st.lists(lookups, min_size=1, max_size=3), prices)
def test_for_lookups_of_many_no_other_lengths_are_better(
    asked: list[DraftOptions], price: tuple[float, float, float]
) -> None:
    best = max(speed(asked, list(others), costs(price)) for others in product(*map(every, asked)))
    assert speed(asked, choose(asked, costs(price)).choices, costs(price)) * MARGIN >= best * (1 - 1e-9)


@given(st.lists(options, min_size=1, max_size=4), prices)
def test_both_proposers_together_are_never_worse_than_lookup_by_more_than_the_margin(
    asked: list[DraftOptions], price: tuple[float, float, float]
) -> None:
    both = speed(asked, choose(asked, costs(price)).choices, costs(price))
    alone = [DraftOptions(option.ngram) for option in asked]
    assert both * MARGIN >= speed(alone, choose(alone, costs(price)).choices, costs(price)) * (1 - 1e-9)


@given(st.lists(options, min_size=1, max_size=4), prices)
def test_speculation_promises_the_margin_more_than_none(
    asked: list[DraftOptions], price: tuple[float, float, float]
) -> None:
    none = [DraftChoice()] * len(asked)
    chosen = choose(asked, costs(price)).choices
    assert chosen == none or speed(asked, chosen, costs(price)) > speed(asked, none, costs(price)) * MARGIN


@given(
    st.lists(options, min_size=1, max_size=4),
    st.lists(st.floats(0.001, 1), min_size=41, max_size=41).map(sorted),
    prices,
)
def test_no_sequence_gets_more_drafts_than_there_are_whatever_rows_cost(
    asked: list[DraftOptions], verify_s: list[float], price: tuple[float, float, float]
) -> None:
    for option, choice in zip(asked, choose(asked, StepCosts(verify_s, costs(price).chain)).choices, strict=True):
        assert choice in every(option)


@given(st.lists(options, min_size=1, max_size=4), prices)
def test_a_plan_predicts_its_own_speed(asked: list[DraftOptions], price: tuple[float, float, float]) -> None:
    plan = choose(asked, costs(price))
    assert math.isclose(plan.speed, speed(asked, plan.choices, costs(price)), rel_tol=1e-9)


def test_a_batch_has_unequal_lengths_where_its_sequences_differ() -> None:
    asked = [DraftOptions([0.9, 0.85, 0.8]), DraftOptions([0.1, 0.01, 0.001]), DraftOptions()]
    price = StepCosts([0.03 + 0.003 * rows for rows in range(16)], lambda _sequences, _length: math.inf)
    assert choose(asked, price).choices == [DraftChoice(Drafter.NGRAM, 3), DraftChoice(), DraftChoice()]


def test_each_sequence_has_the_proposer_that_promises_more_to_it() -> None:
    asked = [DraftOptions([0.9, 0.85, 0.8], [0.4]), DraftOptions([0.1], [0.8, 0.6, 0.5]), DraftOptions()]
    price = StepCosts(
        [0.03 + 0.0003 * rows for rows in range(16)], lambda sequences, length: 0.001 * sequences * length
    )
    assert choose(asked, price).choices == [
        DraftChoice(Drafter.NGRAM, 3),
        DraftChoice(Drafter.EAGLE3, 3),
        DraftChoice(),
    ]


def test_a_chain_has_to_be_worth_its_cost_to_each_sequence_that_lookup_would_serve_for_nothing() -> None:
    sure, unsure = DraftOptions([0.9, 0.85, 0.8], [0.92, 0.87, 0.82]), DraftOptions([0.1], [0.8, 0.6, 0.5])
    price = StepCosts(
        [0.03 + 0.0003 * rows for rows in range(16)], lambda sequences, length: 0.001 * sequences * length
    )
    assert [choice.drafter for choice in choose([sure, unsure], price).choices] == [Drafter.NGRAM, Drafter.EAGLE3]
    free = StepCosts(price.verify, lambda _sequences, _length: 0.0)
    assert [choice.drafter for choice in choose([sure, unsure], free).choices] == [Drafter.EAGLE3, Drafter.EAGLE3]


def test_a_sequence_that_gets_no_draft_needs_no_chain() -> None:
    asked = [DraftOptions(chain=[0.9]), DraftOptions(chain=[0.01])]
    price = StepCosts([0.03 + 0.003 * rows for rows in range(8)], lambda sequences, _length: 0.008 * sequences)
    assert choose(asked, price).choices == [DraftChoice(Drafter.EAGLE3, 1), DraftChoice()]


@pytest.mark.parametrize("forced", [DraftChoice(), DraftChoice(Drafter.NGRAM, 2), DraftChoice(Drafter.EAGLE3, 1)])
def test_a_forced_choice_is_made_whatever_it_costs(forced: DraftChoice) -> None:
    price = StepCosts([0.03 + 0.01 * rows for rows in range(16)], lambda _sequences, _length: 1.0)
    asked = [DraftOptions([0.1, 0.01], [0.1], forced), DraftOptions()]
    assert choose(asked, price).choices == [forced, DraftChoice()]


@given(st.lists(options, min_size=1, max_size=3), st.integers(1, 5), prices)
def test_a_sequence_that_must_not_draft_is_for_others_one_that_cannot(
    asked: list[DraftOptions], num_pinned: int, price: tuple[float, float, float]
) -> None:
    pinned = [DraftOptions([0.9], [0.9], DraftChoice())] * num_pinned
    unable = [DraftOptions()] * num_pinned
    assert choose([*asked, *pinned], costs(price)).choices == choose([*asked, *unable], costs(price)).choices

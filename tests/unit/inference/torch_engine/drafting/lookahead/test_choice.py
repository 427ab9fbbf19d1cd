"""The choice gives most tokens a second by what is known; none of it is a matter of time."""

import math
from itertools import accumulate, product
from operator import mul

from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.lookahead.choice import MARGIN, Choice, Chosen, Costs, Option, choose

rates = st.lists(st.floats(0, 1), max_size=4)
survivals = rates.map(lambda conditional: list(accumulate(conditional, mul)))
options = st.tuples(survivals, survivals).map(
    lambda both: [Option(drafter, alive) for drafter, alive in zip((Drafter.NGRAM, Drafter.EAGLE3), both, strict=True)]
)
prices = st.tuples(st.floats(0.01, 1), st.floats(0, 0.2), st.floats(0, 0.2))


def costs(price: tuple[float, float, float]) -> Costs:
    fixed, row, drafted = price
    return Costs(
        [fixed + row * rows for rows in range(40)], lambda sequences, length: drafted * length * (sequences > 0)
    )


def speed(asked: list[list[Option]], choices: list[Choice], price: Costs) -> float:
    """Tokens a second of a choice, from the definition."""
    tokens, rows, chains = 0.0, 0, []
    for mine, choice in zip(asked, choices, strict=True):
        alive = next((each.survival for each in mine if each.drafter is choice.drafter), ())
        tokens += 1 + sum(alive[: choice.length])
        rows += 1 + choice.length
        chains += [choice.length] if choice.drafter is Drafter.EAGLE3 else []
    return tokens / (price.verify[rows] + (price.chain(len(chains), max(chains)) if chains else 0.0))


def every(mine: list[Option]) -> list[Choice]:
    return [Choice(), *(Choice(each.drafter, n) for each in mine for n in range(1, len(each.survival) + 1))]


@given(options, prices)
def test_for_one_sequence_nothing_is_better(mine: list[Option], price: tuple[float, float, float]) -> None:
    chosen = choose([mine], costs(price)).choices
    best = max(speed([mine], [other], costs(price)) for other in every(mine))
    assert speed([mine], chosen, costs(price)) * MARGIN >= best * (1 - 1e-9)


@given(st.lists(survivals, min_size=1, max_size=3), prices)
def test_for_lookups_of_many_no_other_lengths_are_better(
    alive: list[list[float]], price: tuple[float, float, float]
) -> None:
    asked = [[Option(Drafter.NGRAM, each)] for each in alive]
    best = max(speed(asked, list(others), costs(price)) for others in product(*map(every, asked)))
    assert speed(asked, choose(asked, costs(price)).choices, costs(price)) * MARGIN >= best * (1 - 1e-9)


@given(st.lists(options, min_size=1, max_size=4), prices)
def test_both_drafters_together_are_never_worse_than_one_by_more_than_the_margin(
    asked: list[list[Option]], price: tuple[float, float, float]
) -> None:
    both = speed(asked, choose(asked, costs(price)).choices, costs(price))
    for drafter in (Drafter.NGRAM, Drafter.EAGLE3):
        one = [[option for option in mine if option.drafter is drafter] for mine in asked]
        assert both * MARGIN >= speed(one, choose(one, costs(price)).choices, costs(price)) * (1 - 1e-9)


@given(st.lists(options, min_size=1, max_size=4), prices)
def test_nothing_is_expected_to_be_slower_than_no_drafts(
    asked: list[list[Option]], price: tuple[float, float, float]
) -> None:
    none = [Choice()] * len(asked)
    chosen = choose(asked, costs(price)).choices
    assert chosen == none or speed(asked, chosen, costs(price)) > speed(asked, none, costs(price)) * MARGIN


@given(st.lists(options, max_size=4), st.lists(st.floats(0.001, 1), min_size=41, max_size=41), prices)
def test_nobody_gets_more_drafts_than_there_are_whatever_rows_cost(
    asked: list[list[Option]], verify_s: list[float], price: tuple[float, float, float]
) -> None:
    for mine, choice in zip(asked, choose(asked, Costs(verify_s, costs(price).chain)).choices, strict=True):
        assert choice in every(mine)


def test_a_batch_has_unequal_lengths_where_its_sequences_differ() -> None:
    asked = [[Option(Drafter.NGRAM, [0.9, 0.85, 0.8])], [Option(Drafter.NGRAM, [0.1, 0.01, 0.001])], []]
    price = Costs([0.03 + 0.003 * rows for rows in range(16)], lambda _sequences, _length: math.inf)
    assert choose(asked, price).choices == [Choice(Drafter.NGRAM, 3), Choice(), Choice()]


def test_the_model_drafts_for_the_sequences_that_lookups_leave_out() -> None:
    copies, invents = [0.9, 0.85, 0.8], [0.8, 0.6, 0.5]
    asked = [[Option(Drafter.NGRAM, copies), Option(Drafter.EAGLE3, [0.4])], [Option(Drafter.EAGLE3, invents)], []]
    price = Costs([0.03 + 0.0003 * rows for rows in range(16)], lambda sequences, length: 0.001 * sequences * length)
    assert choose(asked, price).choices == [Choice(Drafter.NGRAM, 3), Choice(Drafter.EAGLE3, 3), Choice()]


def test_who_gets_no_draft_is_not_paid_for() -> None:
    asked = [[Option(Drafter.EAGLE3, [0.9])], [Option(Drafter.EAGLE3, [0.01])]]
    price = Costs([0.03 + 0.003 * rows for rows in range(8)], lambda sequences, _length: 0.008 * sequences)
    assert choose(asked, price).choices == [Choice(Drafter.EAGLE3, 1), Choice()]


@given(st.lists(options, min_size=1, max_size=4), prices)
def test_what_the_draft_model_saves_is_counted_against_the_best_without_it(
    asked: list[list[Option]], price: tuple[float, float, float]
) -> None:
    chosen = choose(asked, costs(price))
    if all(choice.drafter is not Drafter.EAGLE3 for choice in chosen.choices):
        assert chosen == Chosen(chosen.choices)
        return
    lookups = [[option for option in mine if option.drafter is Drafter.NGRAM] for mine in asked]
    without = speed(asked, choose(lookups, costs(price)).choices, costs(price))
    tokens = sum(
        1 + sum(next(each.survival for each in mine if each.drafter is choice.drafter)[: choice.length])
        if choice.length
        else 1
        for mine, choice in zip(asked, chosen.choices, strict=True)
    )
    seconds = tokens / speed(asked, chosen.choices, costs(price))
    assert math.isclose(chosen.token_s, 1 / without)
    assert math.isclose(chosen.saved_s, tokens * chosen.token_s - seconds, rel_tol=1e-6, abs_tol=1e-9)
    assert chosen.saved_s > 0

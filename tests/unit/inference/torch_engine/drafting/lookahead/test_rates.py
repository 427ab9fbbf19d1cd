"""What is known of a chain's positions fades, and is shared where a sequence has seen little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.lookahead.rates import POSITIONS, AcceptanceEstimator, Prior, survival

chains = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40)
ASSUMED = Prior(0.5, 2.0)


def seen(chains: list[tuple[int, bool]], memory: float = 50.0) -> AcceptanceEstimator:
    rates = AcceptanceEstimator(memory)
    for kept, is_refused in chains:
        rates.observe(kept, is_refused=is_refused)
    return rates


@given(chains, chains, st.integers(0, 16))
def test_longer_chains_never_survive_more_often(
    own: list[tuple[int, bool]], shared: list[tuple[int, bool]], n: int
) -> None:
    alive = survival(seen(own), seen(shared), ASSUMED, n, 4.0)
    assert len(alive) == n
    assert alive == sorted(alive, reverse=True)
    assert all(0 < each < 1 for each in alive)


def test_a_sequence_that_saw_nothing_believes_the_others() -> None:
    shared = seen([(3, True)] * 200)
    alive = survival(AcceptanceEstimator(50.0), shared, ASSUMED, 4, 4.0)
    assert alive[2] > 0.9
    assert alive[3] < 0.05


def test_a_sequence_comes_to_believe_itself() -> None:
    shared, own = seen([(3, False)] * 200), seen([(0, True)] * 40)
    assert survival(own, shared, ASSUMED, 1, 4.0)[0] < 0.15


def test_what_was_long_ago_is_forgotten() -> None:
    rates = seen([(0, True)] * 1000 + [(1, False)] * 100)
    assert rates.rates([0.5] * POSITIONS, 1.0)[0] > 0.85
    assert rates.num_seen(0) <= 50.0


def test_late_positions_share_one_rate() -> None:
    alive = survival(AcceptanceEstimator(50.0), seen([(POSITIONS + 5, True)] * 20), ASSUMED, POSITIONS + 20, 4.0)
    last = alive[POSITIONS - 1] / alive[POSITIONS - 2]
    assert alive[-1] == pytest.approx(alive[POSITIONS - 1] * last**20)

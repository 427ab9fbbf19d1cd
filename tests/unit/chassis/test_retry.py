import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from updraft_chassis.retry import Backoff

seconds = st.floats(min_value=0.001, max_value=100.0)


@given(initial_s=seconds, cap_s=seconds, seed=st.integers(0, 100))
def test_a_delay_never_exceeds_its_exponential_bound_nor_the_cap(initial_s: float, cap_s: float, seed: int) -> None:
    backoff = Backoff(initial_s=initial_s, cap_s=cap_s, rng=random.Random(seed))
    for attempt, delay_s in enumerate(itertools.islice(backoff, 20)):
        assert 0.0 <= delay_s <= min(cap_s, initial_s * 2**attempt)


def test_the_jitter_is_full() -> None:
    backoff = Backoff(initial_s=1.0, cap_s=1.0, rng=random.Random(1))
    delays = sorted(itertools.islice(backoff, 1000))
    assert delays[0] < 0.01
    assert delays[-1] > 0.99
    assert abs(sum(delays) / 1000 - 0.5) < 0.03


def test_after_a_reset_the_first_bound_holds_again() -> None:
    backoff = Backoff(initial_s=0.1, cap_s=1000.0, rng=random.Random(1))
    assert max(itertools.islice(backoff, 12)) > 10
    backoff.reset()
    assert next(backoff) <= 0.1


def test_backoff_goes_on_for_ever() -> None:
    backoff = Backoff(initial_s=1.0, cap_s=30.0)
    assert all(delay_s <= 30.0 for delay_s in itertools.islice(backoff, 5000))

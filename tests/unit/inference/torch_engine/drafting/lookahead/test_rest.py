"""A draft model beside lookups rests while its chains do not earn what it reads, and what it would earn stays known."""

from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.lookahead.rest import FIRST_GAP, LEAST_STEPS, LONGEST_GAP, MEMORY, Rest

seconds = st.integers(0, 1000).map(lambda ms: ms / 1000)


def serve(rest: Rest, steps: int, *, saved_s: float, read_s: float) -> Rest:
    for _ in range(steps):
        rest.count_step()
        rest.save(saved_s)
        rest.read(read_s)
    return rest


def admitted(rest: Rest, requests: int) -> list[int]:
    """Which of the requests that begin now the model reads."""
    return [n for n in range(1, requests + 1) if rest.admits(1)]


@given(seconds, seconds)
def test_once_judged_it_reads_all_requests_just_if_it_earns_that(saved_s: float, read_s: float) -> None:
    rest = serve(Rest(), LEAST_STEPS, saved_s=saved_s, read_s=read_s)
    assert rest.admits(1) is (saved_s >= read_s)


@given(st.lists(st.tuples(seconds, seconds), max_size=LEAST_STEPS - 1))
def test_a_few_steps_say_nothing(steps: list[tuple[float, float]]) -> None:
    rest = Rest()
    for saved_s, read_s in steps:
        serve(rest, 1, saved_s=saved_s, read_s=read_s)
        assert rest.admits(1)


def test_while_it_rests_it_reads_ever_fewer_requests_but_never_none() -> None:
    rest = serve(Rest(), LEAST_STEPS, saved_s=0.0, read_s=0.001)
    found = admitted(rest, 20 * LONGEST_GAP)
    gaps = [after - before - 1 for before, after in zip([0, *found], found, strict=False)]
    assert gaps[0] == FIRST_GAP
    assert gaps == sorted(gaps)
    assert gaps[-10:] == [LONGEST_GAP] * 10


def test_requests_that_run_at_once_are_tried_together() -> None:
    rest = serve(Rest(), LEAST_STEPS, saved_s=0.0, read_s=0.001)
    found = [rest.admits(at_once) for _ in range(80) for at_once in (1, 2, 3, 4)]  # all four begin, whenever they end
    assert found[: 5 * FIRST_GAP] == [False] * 4 * FIRST_GAP + [True] * 4 + [False] * (FIRST_GAP - 4)
    assert found.count(True) == 8


def test_losses_of_long_ago_are_forgotten() -> None:
    rest = serve(Rest(), 10 * MEMORY, saved_s=0.0, read_s=0.002)
    assert not rest.admits(1)
    serve(rest, 2 * MEMORY, saved_s=0.004, read_s=0.002)
    assert admitted(rest, 100) == list(range(1, 101))


def test_one_that_earned_and_earns_no_more_is_tried_soon_at_first() -> None:
    rest = serve(Rest(), LEAST_STEPS, saved_s=0.0, read_s=0.001)
    admitted(rest, 20 * LONGEST_GAP)
    serve(rest, 4 * MEMORY, saved_s=0.002, read_s=0.001)
    assert rest.admits(1)
    serve(rest, 8 * MEMORY, saved_s=0.0, read_s=0.001)
    assert admitted(rest, 2 * FIRST_GAP) == [FIRST_GAP + 1]


def test_another_draft_model_is_not_judged_by_what_the_last_one_did() -> None:
    rest = serve(Rest(), 10 * MEMORY, saved_s=0.0, read_s=0.001)
    rest.begin_anew()
    assert rest.admits(1)

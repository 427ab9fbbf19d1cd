"""A proposer that is not in use is tried ever more rarely, and the draft model is off while it does not pay."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.lookahead.probe import (
    FIRST_GAP,
    LONGEST_GAP,
    DraftModelGate,
    ProbeSchedule,
)


def test_gaps_between_probes_double_up_to_the_longest() -> None:
    schedule = ProbeSchedule()
    probed = [i for i in range(20 * LONGEST_GAP) if schedule.next(2)]
    starts = probed[::2]
    assert probed[1::2] == [start + 1 for start in starts]
    gaps = [later - earlier - 2 for earlier, later in pairwise(starts)]
    assert starts[0] == 2 * FIRST_GAP
    assert gaps[0] == 4 * FIRST_GAP
    assert set(gaps[4:]) == {2 * LONGEST_GAP}


def test_a_proposer_in_use_is_not_probed() -> None:
    schedule = ProbeSchedule()
    for _ in range(10 * FIRST_GAP):
        assert not schedule.next(1)
        schedule.defer()


def test_a_probe_that_proves_better_is_repeated_soon() -> None:
    schedule = ProbeSchedule()
    for _ in range(20 * LONGEST_GAP):
        schedule.next(1)
    schedule.reset()
    schedule.defer()
    assert any(schedule.next(1) for _ in range(FIRST_GAP + 1))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=2000))
def test_a_probe_is_as_large_as_the_most_that_were_asked_for(sizes: list[int]) -> None:
    schedule = ProbeSchedule()
    probed = [schedule.next(size) for size in sizes]
    runs = "".join("x" if is_probe else " " for is_probe in probed).split()
    assert all(len(run) <= max(sizes) for run in runs)


def closed() -> DraftModelGate:
    gate = DraftModelGate()
    for _ in range(DraftModelGate.MIN_STEPS):
        gate.count_step()
    gate.add(-1.0)
    return gate


def test_the_gate_is_open_until_enough_steps_are_known() -> None:
    gate = DraftModelGate()
    gate.add(-1.0)
    assert gate.admits(1)
    for _ in range(DraftModelGate.MIN_STEPS):
        gate.count_step()
    assert not gate.admits(1)


def test_a_closed_gate_admits_as_many_requests_as_run_at_once_now_and_then() -> None:
    gate = closed()
    admitted = [gate.admits(4) for _ in range(4 * FIRST_GAP + 4)]
    assert admitted == [False] * 4 * FIRST_GAP + [True] * 4


def test_savings_and_another_draft_model_open_the_gate() -> None:
    gate = closed()
    gate.add(1.1)
    assert gate.admits(1)
    gate = closed()
    gate.reset()
    assert gate.admits(1)


def test_what_was_read_long_ago_is_forgotten() -> None:
    gate = closed()
    for _ in range(10 * DraftModelGate.MEMORY):
        gate.count_step()
    gate.add(0.001)
    assert gate.admits(1)

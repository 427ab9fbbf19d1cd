"""A proposer that is not in use is tried ever more rarely, and the draft model is off while it does not pay."""

from itertools import groupby, pairwise

from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.drafting.lookahead.probe import (
    FIRST_GAP,
    LONGEST_GAP,
    DraftModelGate,
    ProbeSchedule,
)


def test_gaps_between_probes_double_up_to_the_longest() -> None:
    schedule = ProbeSchedule(2)
    probed = [i for i in range(20 * LONGEST_GAP) if schedule.next()]
    starts = probed[::2]
    assert probed[1::2] == [start + 1 for start in starts]
    gaps = [later - earlier - 2 for earlier, later in pairwise(starts)]
    assert starts[0] == 2 * FIRST_GAP
    assert gaps[0] == 4 * FIRST_GAP
    assert set(gaps[4:]) == {2 * LONGEST_GAP}


def test_a_proposer_in_use_is_not_probed() -> None:
    schedule = ProbeSchedule(1)
    for _ in range(10 * FIRST_GAP):
        assert not schedule.next()
        schedule.defer()


def test_a_probe_that_proves_better_is_repeated_soon() -> None:
    schedule = ProbeSchedule(1)
    for _ in range(20 * LONGEST_GAP):
        schedule.next()
    schedule.reset()
    schedule.defer()
    assert any(schedule.next() for _ in range(FIRST_GAP + 1))


@given(st.integers(1, 9))
def test_a_probe_has_as_many_events_as_were_asked_for(size: int) -> None:
    schedule = ProbeSchedule(size)
    probed = [schedule.next() for _ in range(10 * FIRST_GAP * size)]
    runs = [len(list(run)) for is_probe, run in groupby(probed) if is_probe]
    assert set(runs[:-1]) == {size}
    assert runs[-1] <= size


def closed() -> DraftModelGate:
    gate = DraftModelGate()
    for _ in range(DraftModelGate.MIN_STEPS):
        gate.observe(8, 1)
    return gate


def test_the_gate_is_open_until_enough_steps_are_known() -> None:
    gate = DraftModelGate()
    for _ in range(DraftModelGate.MIN_STEPS):
        assert gate.is_open
        gate.observe(1, 0)
    assert not gate.is_open


def test_a_probe_opens_the_gate_for_as_many_steps_as_a_new_model_gets_ever_more_rarely() -> None:
    gate = closed()
    is_open = []
    for _ in range(200 * DraftModelGate.MIN_STEPS):
        gate.observe(8 * gate.is_open, 0)
        is_open.append(gate.is_open)
    runs = [len(list(run)) for is_run_open, run in groupby(is_open) if is_run_open]
    assert set(runs) == {DraftModelGate.MIN_STEPS}
    gaps = [len(list(run)) for is_run_open, run in groupby(is_open) if not is_run_open]
    assert gaps[0] >= FIRST_GAP * DraftModelGate.MIN_STEPS - 1
    assert gaps[1] > 1.9 * gaps[0]


def test_use_and_another_draft_model_open_the_gate() -> None:
    gate = closed()
    for _ in range(DraftModelGate.MEMORY):
        gate.observe(8, 8)
    assert gate.is_open
    gate = closed()
    gate.reset()
    assert gate.is_open

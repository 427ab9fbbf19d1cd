from contextlib import suppress

import pytest
from tests.support.clock import ManualClock

from updraft_trainer.coordination.watch import Activity, PeerState, Phase, StallLog, Watch, is_compiling

LIMIT_S = 60.0


def peer(
    rank: int, activity: Activity = Activity.STEP, *, is_waiting: bool = False, silent_s: float = 1.0
) -> PeerState:
    return PeerState(rank=rank, phase=Phase(activity=activity, for_s=65.0, is_waiting=is_waiting), silent_s=silent_s)


def compiling(for_s: float) -> PeerState:
    return PeerState(rank=0, phase=Phase(activity=Activity.COMPILE, for_s=for_s), silent_s=1.0)


def test_a_watch_knows_what_a_rank_is_busy_with_and_whether_it_waits() -> None:
    clock = ManualClock()
    watch = Watch(clock)
    assert watch.phase == Phase()
    watch.begin(Activity.STEP)
    clock.advance(5.0)
    with watch.waiting():
        assert watch.phase == Phase(activity=Activity.STEP, for_s=5.0, is_waiting=True)
    assert not watch.phase.is_waiting
    watch.begin(Activity.IDLE)
    clock.advance(500.0)
    assert watch.phase == Phase(), "a rank that has nothing to do stalls nobody"


def test_a_wait_that_breaks_is_over() -> None:
    watch = Watch(ManualClock())
    watch.begin(Activity.STEP)
    with pytest.raises(OSError, match="broken"), watch.waiting():
        raise OSError("broken")
    assert not watch.phase.is_waiting


def test_a_phase_within_the_limit_is_no_stall() -> None:
    assert StallLog(LIMIT_S).sentence(0, Phase(activity=Activity.ESTIMATE, for_s=59.0), []) == ""


def test_a_stall_names_the_rank_its_phase_and_the_ranks_that_it_waits_for() -> None:
    others = [
        peer(1),
        peer(2, is_waiting=True),
        peer(3, Activity.IDLE, silent_s=1.0),
        peer(4, is_waiting=True, silent_s=42.0),
    ]
    waiting = Phase(activity=Activity.STEP, for_s=66.0, is_waiting=True)
    assert StallLog(LIMIT_S).sentence(0, waiting, others) == (
        "rank 0 has been busy with a training step for 66 s, and waits for rank 1, which has been busy with a training step for"
        " 65 s; rank 3, which is idle; rank 4, which has not been heard of for 42 s"
    )
    computing = Phase(activity=Activity.ESTIMATE, for_s=66.0)
    assert StallLog(LIMIT_S).sentence(1, computing, others) == "rank 1 has been busy with an estimate for 66 s"


def test_an_idle_rank_reports_a_rank_0_that_hangs_and_says_nothing_while_that_one_works() -> None:
    log, idle = StallLog(LIMIT_S), Phase()
    assert log.sentence(1, idle, []) == ""
    assert log.sentence(1, idle, [peer(0, Activity.IDLE)]) == ""
    assert log.sentence(1, idle, [peer(0, is_waiting=True)]) == "", "it waits for a rank itself"
    assert log.sentence(1, idle, [peer(0, Activity.IDLE, silent_s=61.0)]) == (
        "rank 1 is idle, and waits for rank 0, which has not been heard of for 61 s"
    )
    assert log.sentence(1, idle, [peer(0, Activity.IDLE, silent_s=100.0)]) == "", (
        "said once until it has lasted twice as long"
    )
    assert log.sentence(1, idle, [peer(0, Activity.IDLE)]) == ""
    assert log.sentence(1, idle, [peer(0, Activity.FIT)]) == (
        "rank 1 is idle, and waits for rank 0, which has been busy with a fit in closed form for 65 s"
    )
    assert StallLog(LIMIT_S).sentence(1, idle, [peer(2, Activity.IDLE, silent_s=61.0)]) == "", (
        "it does not wait for that one"
    )


def test_a_stall_is_said_again_when_it_has_lasted_twice_as_long() -> None:
    log = StallLog(LIMIT_S)
    times = [61, 100, 121, 200, 239, 241, 5, 61]
    said = [bool(log.sentence(0, Phase(activity=Activity.ESTIMATE, for_s=for_s), [])) for for_s in times]
    assert said == [True, False, True, False, False, True, False, True]


def test_a_phase_within_another_one_has_a_time_of_its_own_and_the_other_one_begins_anew() -> None:
    clock = ManualClock()
    watch = Watch(clock)
    watch.begin(Activity.STEP)
    clock.advance(5.0)
    with suppress(OSError), watch.during(Activity.COMPILE):
        clock.advance(7.0)
        assert watch.phase == Phase(activity=Activity.COMPILE, for_s=7.0)
        raise OSError("broken")
    clock.advance(1.0)
    assert watch.phase == Phase(activity=Activity.STEP, for_s=1.0)


@pytest.mark.parametrize(
    ("phase", "others", "expected"),
    [
        pytest.param(Phase(activity=Activity.COMPILE, for_s=900.0), [peer(1)], True, id="itself"),
        pytest.param(Phase(activity=Activity.STEP, for_s=900.0), [peer(1, Activity.COMPILE)], False, id="it computes"),
        pytest.param(
            Phase(activity=Activity.STEP, is_waiting=True),
            [peer(1, Activity.COMPILE), peer(2, is_waiting=True)],
            True,
            id="the only one that is waited for",
        ),
        pytest.param(
            Phase(activity=Activity.STEP, is_waiting=True),
            [peer(1, Activity.COMPILE), peer(2)],
            False,
            id="one of two that are waited for",
        ),
        pytest.param(
            Phase(activity=Activity.STEP, is_waiting=True),
            [peer(1, Activity.COMPILE, silent_s=42.0)],
            False,
            id="one that is not heard of",
        ),
        pytest.param(Phase(), [peer(0, Activity.COMPILE), peer(2)], True, id="rank 0, by an idle one"),
        pytest.param(Phase(), [], False, id="nobody is heard of"),
        pytest.param(Phase(activity=Activity.COMPILE, for_s=1801.0), [], False, id="itself, and it hangs"),
        pytest.param(Phase(), [compiling(1801.0)], False, id="rank 0, and it hangs"),
    ],
)
def test_what_waits_for_a_compiler_does_not_stall(phase: Phase, others: list[PeerState], expected: bool) -> None:  # noqa: FBT001
    assert is_compiling(phase, others) is expected


def test_labels_of_activities_are_words_without_spaces_and_are_read_back() -> None:
    assert all(one.isascii() and one.replace("_", "").isalpha() and one == Activity(one) for one in Activity)
    assert len({one.words for one in Activity}) == len(Activity)
    assert f"{Activity.IDLE}" == "idle"

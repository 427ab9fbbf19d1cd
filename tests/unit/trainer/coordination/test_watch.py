import pytest
from tests.support.clock import ManualClock

from updraft_trainer.coordination.watch import PeerState, Phase, StallLog, Watch

LIMIT_S = 60.0


def peer(rank: int, name: str = "a training step", *, is_waiting: bool = False, silent_s: float = 1.0) -> PeerState:
    return PeerState(rank=rank, phase=Phase(name=name, for_s=65.0, is_waiting=is_waiting), silent_s=silent_s)


def test_a_watch_knows_what_a_rank_is_busy_with_and_whether_it_waits() -> None:
    clock = ManualClock()
    watch = Watch(clock)
    assert watch.phase == Phase()
    watch.begin("a training step")
    clock.advance(5.0)
    with watch.waiting():
        assert watch.phase == Phase(name="a training step", for_s=5.0, is_waiting=True)
    assert not watch.phase.is_waiting
    watch.begin("")
    clock.advance(500.0)
    assert watch.phase == Phase(), "a rank that has nothing to do stalls nobody"


def test_a_wait_that_breaks_is_over() -> None:
    watch = Watch(ManualClock())
    watch.begin("a training step")
    with pytest.raises(OSError, match="broken"), watch.waiting():
        raise OSError("broken")
    assert not watch.phase.is_waiting


def test_a_phase_within_the_limit_is_no_stall() -> None:
    assert StallLog(LIMIT_S).sentence(0, Phase(name="an estimate", for_s=59.0), []) == ""


def test_a_stall_names_the_rank_its_phase_and_the_ranks_that_it_waits_for() -> None:
    others = [peer(1), peer(2, is_waiting=True), peer(3, "", silent_s=1.0), peer(4, is_waiting=True, silent_s=42.0)]
    waiting = Phase(name="a training step", for_s=66.0, is_waiting=True)
    assert StallLog(LIMIT_S).sentence(0, waiting, others) == (
        "rank 0 has been busy with a training step for 66 s, and waits for rank 1, which has been busy with a training step for"
        " 65 s; rank 3, which is idle; rank 4, which has not been heard of for 42 s"
    )
    computing = Phase(name="an estimate", for_s=66.0)
    assert StallLog(LIMIT_S).sentence(1, computing, others) == "rank 1 has been busy with an estimate for 66 s"


def test_an_idle_rank_reports_a_rank_0_that_hangs_and_says_nothing_while_that_one_works() -> None:
    log, idle = StallLog(LIMIT_S), Phase()
    assert log.sentence(1, idle, []) == ""
    assert log.sentence(1, idle, [peer(0, "")]) == ""
    assert log.sentence(1, idle, [peer(0, is_waiting=True)]) == "", "it waits for a rank itself"
    assert log.sentence(1, idle, [peer(0, "", silent_s=61.0)]) == (
        "rank 1 is idle, and waits for rank 0, which has not been heard of for 61 s"
    )
    assert log.sentence(1, idle, [peer(0, "", silent_s=100.0)]) == "", "said once until it has lasted twice as long"
    assert log.sentence(1, idle, [peer(0, "")]) == ""
    assert log.sentence(1, idle, [peer(0, "a fit")]) == (
        "rank 1 is idle, and waits for rank 0, which has been busy with a fit for 65 s"
    )
    assert StallLog(LIMIT_S).sentence(1, idle, [peer(2, "", silent_s=61.0)]) == "", "it does not wait for that one"


def test_a_stall_is_said_again_when_it_has_lasted_twice_as_long() -> None:
    log = StallLog(LIMIT_S)
    times = [61, 100, 121, 200, 239, 241, 5, 61]
    said = [bool(log.sentence(0, Phase(name="an estimate", for_s=for_s), [])) for for_s in times]
    assert said == [True, False, True, False, False, True, False, True]

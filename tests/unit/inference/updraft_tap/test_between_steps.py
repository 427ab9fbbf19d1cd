import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support.wait import wait_until

from updraft_tap.between_steps import BetweenSteps, NeverBetweenStepsError


def test_an_idle_engine_lets_the_caller_do_it_while_the_device_is_at_rest() -> None:
    order: list[str] = []
    between = BetweenSteps(lambda: order.append("at rest"))

    took_s = between.run(lambda: order.append(threading.current_thread().name), 5)

    assert order == ["at rest", threading.current_thread().name, "at rest"]
    assert took_s >= 0


def test_a_busy_engine_does_it_on_its_own_thread_before_its_next_step() -> None:
    order: list[object] = []
    between = BetweenSteps()
    between.begin()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(between.run, lambda: order.append(threading.get_ident()), 30)
        wait_until(lambda: between._waiting is not None)
        assert order == []
        order.append("the step goes on")
        between.begin()  # of the next step, with no end of the first: nobody could take the lock in between
        done.result(30)
        between.end()

    assert order == ["the step goes on", threading.get_ident()]


def test_work_never_runs_within_a_step() -> None:
    between = BetweenSteps()
    is_within, overlaps, stop = threading.Event(), [], threading.Event()

    def engine() -> None:
        while not stop.is_set():
            between.begin()
            is_within.set()
            stop.wait(0.001)
            is_within.clear()
            between.end()
            stop.wait(0.001)  # so that either thread does some of the work

    def work() -> None:
        overlaps.append(is_within.is_set())
        stop.wait(0.001)
        overlaps.append(is_within.is_set())

    thread = threading.Thread(target=engine)
    thread.start()
    for _ in range(100):
        between.run(work, 30)
    stop.set()
    thread.join()

    assert overlaps == [False] * 200


def test_an_error_is_the_callers_and_the_engine_goes_on() -> None:
    between = BetweenSteps()

    with pytest.raises(ZeroDivisionError):
        between.run(lambda: 1 // 0, 5)  # type: ignore[arg-type]  # raises
    between.begin()
    between.end()
    between.end()

    assert between.run(lambda: None, 5) >= 0


def test_an_exit_on_the_engines_thread_is_the_callers_and_the_engine_goes_on() -> None:
    between = BetweenSteps()
    between.begin()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(between.run, lambda: sys.exit("no kernel"), 30)
        wait_until(lambda: between._waiting is not None)
        between.begin()
        between.end()
        with pytest.raises(SystemExit, match="no kernel"):
            done.result(30)

    assert between.run(lambda: None, 5) >= 0


def test_an_engine_that_stays_within_a_step_is_given_up_and_the_work_is_not_done_later() -> None:
    between, done = BetweenSteps(), []
    between.begin()

    with pytest.raises(NeverBetweenStepsError):
        between.run(lambda: done.append(1), 0.01)
    between.end()
    between.begin()
    between.end()

    assert done == []


def test_an_engine_that_waits_for_its_step_gets_it_before_the_next_work() -> None:
    between, order = BetweenSteps(), list[str]()

    def step() -> None:
        between.begin()
        order.append("step")
        between.end()

    engine = threading.Thread(target=step)

    def first() -> None:
        engine.start()
        wait_until(lambda: between._is_due)

    between.run(first, 30)
    between.run(lambda: order.append("engine" if threading.current_thread() is engine else "caller"), 30)
    engine.join()

    assert order in (["engine", "step"], ["step", "caller"])


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_the_time_of_the_work_contains_that_of_the_device(monkeypatch: pytest.MonkeyPatch, *, is_busy: bool) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def synchronize() -> None:
        clock[0] += 3

    between = BetweenSteps(synchronize)
    if is_busy:
        between.begin()
    with ThreadPoolExecutor(1) as pool:
        took_s = pool.submit(between.run, lambda: None, 30)
        if is_busy:
            wait_until(lambda: between._waiting is not None)
            between.begin()
        assert took_s.result(30) == 6


def test_work_that_failed_before_it_began_is_not_done_later() -> None:
    done: list[int] = []

    def synchronize() -> None:
        raise RuntimeError("the device is lost")

    between = BetweenSteps(synchronize)
    with pytest.raises(RuntimeError, match="the device is lost"):
        between.run(lambda: done.append(1), 5)
    between.begin()
    between.end()

    assert done == []

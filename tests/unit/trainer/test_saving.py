"""Saves come early enough, one at a time, and a full disk costs one of them."""

import asyncio
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.disk import file_size_limit
from tests.support.states import IDENTITY, make_state
from tests.support.wait import until

from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.schedule import Progress, TrainingSchedule
from updraft_trainer.saving import Saver
from updraft_trainer.states.state import State, States

MOST_S = 60.0


class SlowStates(States):
    """Each save ends when it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def save(self, state: State) -> Path:
        self.has_begun.set()
        assert self.may_end.wait(60)
        self.may_end.clear()
        return super().save(state)


@dataclass
class Learning:
    """A learner that takes steps and saves, in the test's time; a kill at any moment would cost what `worst_s` says.

    The file system takes `save_s` for a state, and copying one `copy_s`.
    """

    states: SlowStates
    step_s: float
    save_s: float
    copy_s: float
    clock: ManualClock = field(default_factory=ManualClock)
    metrics: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))
    step: int = 0
    taken_s: float = 0.0
    durable_s: float = 0.0
    """When the newest durable state was taken."""
    ends_s: float | None = None
    """When the save that runs is durable."""
    worst_s: float = 0.0
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        schedule = TrainingSchedule(evaluate_steps=1, evaluate_seconds=1.0, checkpoint_seconds=MOST_S)
        self.saver = Saver(
            self.states,
            schedule,
            take=self.take,
            progress=lambda: Progress(step=self.step, num_held_out=0, at_s=self.clock.monotonic()),
            metrics=self.metrics,
            clock=self.clock,
        )

    def take(self) -> State:
        self.taken_s = self.clock.monotonic()
        self.clock.advance(self.copy_s)
        return make_state(self.step)

    async def train(self) -> None:
        """One step, during which a save may become durable."""
        await self.pass_time(self.step_s)
        self.step += 1
        self.states.has_begun.clear()
        before_s = self.taken_s
        await self.saver.save_if_due(step_s=self.step_s)
        if self.taken_s != before_s:
            await asyncio.to_thread(self.states.has_begun.wait, 60)
            self.ends_s = self.clock.monotonic() + self.save_s

    async def pass_time(self, seconds: float) -> None:
        until_s = self.clock.monotonic() + seconds
        if self.ends_s is not None and self.ends_s <= until_s:
            self.clock.advance(self.ends_s - self.clock.monotonic())
            self.note_loss()
            self.states.may_end.set()
            await self.saver.written()
            self.durable_s, self.ends_s = self.taken_s, None
        self.clock.advance(until_s - self.clock.monotonic())
        self.note_loss()

    def note_loss(self) -> None:
        self.worst_s = max(self.worst_s, self.clock.monotonic() - self.durable_s)

    def num_saved(self) -> float:
        return self.metrics.registry.get_sample_value("updraft_trainer_checkpoint_seconds_count") or 0.0


@pytest.mark.parametrize(
    ("step_s", "save_s", "copy_s"),
    [
        pytest.param(0.5, 1.0, 0.1, id="a small draft"),
        pytest.param(3.0, 20.0, 3.0, id="a state that takes long"),
        pytest.param(20.0, 15.0, 2.0, id="steps that take long"),
        pytest.param(1.0, 28.0, 1.0, id="as slow as it may be"),
    ],
)
async def test_a_kill_at_any_moment_costs_no_more_time_than_it_may(
    tmp_path: Path, step_s: float, save_s: float, copy_s: float
) -> None:
    learning = Learning(SlowStates(tmp_path), step_s, save_s, copy_s)
    while learning.clock.monotonic() < 20 * MOST_S:
        await learning.train()
    assert learning.worst_s <= MOST_S
    assert learning.worst_s > MOST_S - step_s - copy_s - save_s, "saves are no more frequent than they have to be"
    learning.states.may_end.set()


async def test_saves_that_are_too_slow_for_the_promise_say_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learning = Learning(SlowStates(tmp_path), step_s=5.0, save_s=50.0, copy_s=0.0)
    while learning.clock.monotonic() < 10 * MOST_S:
        await learning.train()
    (message,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert message.startswith(
        "Saving takes 50 s, so a kill may cost 100 s of training, more than UPDRAFT_TRAINER_CHECK"
    )
    assert learning.worst_s <= 2 * 50 + 5
    learning.states.may_end.set()


async def test_a_state_that_no_disk_holds_yet_is_saved_at_once(tmp_path: Path) -> None:
    learning = Learning(SlowStates(tmp_path), step_s=1.0, save_s=1.0, copy_s=0.0)
    learning.saver.request_save()
    learning.states.may_end.set()
    await learning.saver.save_if_due()
    await until(lambda: learning.num_saved() == 1)
    assert learning.states.load(IDENTITY) is not None


async def test_a_full_disk_is_counted_and_the_state_before_is_loaded_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = States(tmp_path)
    learning = Learning(SlowStates(tmp_path / "unused"), step_s=1.0, save_s=0.0, copy_s=0.0)
    learning.saver._states = states  # the real one, which nothing holds up
    saver, clock = learning.saver, learning.clock

    async def next_save() -> None:
        clock.advance(MOST_S)
        learning.step += 1
        await saver.save_if_due()
        await saver.written()

    await next_save()
    with file_size_limit(100):
        await next_save()
    assert learning.metrics.registry.get_sample_value("updraft_trainer_checkpoint_failures_total") == 1
    assert "Could not save, trying again later: cannot save to" in caplog.text
    state = states.load(IDENTITY)
    assert state is not None
    assert state.learner["step"] == 1
    await next_save()
    state = states.load(IDENTITY)
    assert state is not None
    assert state.learner["step"] == 3


async def test_a_stop_right_after_a_save_does_not_write_the_same_state_again(tmp_path: Path) -> None:
    learning = Learning(SlowStates(tmp_path), step_s=1.0, save_s=1e9, copy_s=0.0)
    learning.states.may_end.set()
    await learning.saver.save()
    await learning.saver.save()
    assert learning.num_saved() == 1


async def test_a_stop_saves_the_last_step_after_a_save_that_is_under_way(tmp_path: Path) -> None:
    learning = Learning(SlowStates(tmp_path), step_s=1.0, save_s=1e9, copy_s=0.0)
    while learning.ends_s is None:
        await learning.train()
    await learning.train()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(learning.saver.save())
        for count in (1, 2):
            learning.states.may_end.set()
            await until(lambda: learning.num_saved() == count, what="a save")  # noqa: B023 - awaited within the loop
    state = learning.states.load(IDENTITY)
    assert state is not None
    assert state.learner["step"] == learning.step

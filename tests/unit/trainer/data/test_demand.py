"""The demand keeps training busy with fresh samples, and no more than that."""

import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_target import make_tiny_target
from tests.support.traces import TraceMaker

from updraft_inference.agent.credits import TokenBucket
from updraft_trainer.data.demand import (
    BACKLOG_S,
    BURST,
    FILL_S,
    FIRST_REQUEST_TOKENS,
    FRESH_SHARE,
    FULL_SHARE,
    HEADROOM,
    DemandMeter,
    IntakeSpeed,
    ReplayFill,
    demand,
    storable,
    wanted_that_fit,
)
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import CHUNK_MARK, ReplayLimits
from updraft_trainer.data.sample import read_sample

ENOUGH = ReplayFill(wanted_training=0, wanted_held_out=0)
USED_UP = 1000.0 * FRESH_SHARE / 5
"""Captured tokens per second that training at a speed of 1,000 uses up, with five uses of each."""


def with_backlog(backlog_s: float) -> float:
    unused = round(backlog_s * 1000.0 * FRESH_SHARE / 10.0)
    fill = ReplayFill(wanted_training=0, wanted_held_out=0, unused=unused)
    return demand(fill, speed=1000.0, request_tokens=10.0, max_uses=5)


@pytest.mark.parametrize(
    ("backlog_s", "times"), [(0.0, BURST), (BACKLOG_S, 1.0), (2 * BACKLOG_S, 1 / BURST), (3 * BACKLOG_S, BURST**-2)]
)
def test_the_demand_is_a_burst_without_fresh_samples_and_little_with_many(backlog_s: float, times: float) -> None:
    assert with_backlog(backlog_s) == pytest.approx(times * USED_UP)


def test_replay_that_is_fed_by_its_demand_settles_at_its_backlog() -> None:
    for start_s in (0.0, 5 * BACKLOG_S):
        backlog_s = start_s
        for _ in range(3600):  # each second training works off one second of backlog, and the demand arrives
            backlog_s = max(0.0, backlog_s - 1.0 + with_backlog(backlog_s) / USED_UP)
        assert backlog_s == pytest.approx(BACKLOG_S, abs=2.0)


def test_missing_held_out_requests_are_demanded_within_a_minute() -> None:
    fill = ReplayFill(num_training=10**6, num_held_out=24, wanted_training=128, wanted_held_out=32, unused=10**9)
    demanded = demand(fill, speed=1000.0, request_tokens=500.0, max_uses=5)
    assert demanded * FILL_S * 0.1 / 500.0 == pytest.approx(8.0), "a tenth of the captured requests is held out"


def test_before_training_has_a_speed_the_first_requests_are_demanded() -> None:
    fill = ReplayFill(wanted_training=90, wanted_held_out=0)
    assert demand(fill, speed=0.0, request_tokens=600.0, max_uses=5) == pytest.approx(100 * 600.0 / FILL_S)
    assert demand(ENOUGH, speed=0.0, request_tokens=600.0, max_uses=5) == 0.0


@given(
    stored=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    unused=st.integers(0, 10**9),
    speed=st.floats(0.0, 1e6),
    request_tokens=st.floats(1.0, 1e5),
)
def test_more_in_replay_never_raises_the_demand(
    stored: tuple[int, int], unused: int, speed: float, request_tokens: float
) -> None:
    def demanded(more: int) -> float:
        fill = ReplayFill(
            num_training=stored[0] + more,
            num_held_out=stored[1] + more,
            wanted_training=128,
            wanted_held_out=32,
            unused=unused + more,
        )
        return demand(fill, speed=speed, request_tokens=request_tokens, max_uses=6)

    assert 0.0 <= demanded(1) <= demanded(0) < float("inf")


def test_requests_for_which_there_is_no_room_are_not_missing() -> None:
    assert wanted_that_fit(32, (0, 0), 1000) == 32, "nothing is known of their size"
    assert wanted_that_fit(32, (4, 400), 1000) == 9
    assert wanted_that_fit(32, (4, 400), 100_000) == 32
    assert wanted_that_fit(32, (1, 2000), 1000) == 0


def admit(replay: Replay, maker: TraceMaker, count: int, *, num_chunks: int = 1) -> None:
    """So many requests, each in so many chunks."""
    for seed in range(count):
        data = maker.data(seed, num_output=8)
        sample = read_sample(data, maker.expected)
        names = [sample.trace_id, *(f"{sample.trace_id}{CHUNK_MARK}{chunk}" for chunk in range(1, num_chunks))]
        replay.admit([IncomingTrace(sample=replace(sample, trace_id=name), data=data) for name in names])


def test_requests_are_missing_until_enough_of_them_came_in_however_many_chunks(
    maker: TraceMaker, tmp_path: Path
) -> None:
    limits = ReplayLimits.of(10**8)
    with Replay.open(tmp_path / "replay", limits=limits, expected=maker.expected, cache_bytes=0) as replay:
        meter = DemandMeter(replay, limits, num_held_out=0, max_uses=2)
        admit(replay, maker, 28, num_chunks=5)
        assert meter.tokens_per_s() == pytest.approx(100 / 0.9 * FIRST_REQUEST_TOKENS / FILL_S)
        meter.trained([20, 20], start_s=0.0, end_s=1.0)
        uses = dict.fromkeys(replay.training_ids(), 2)
        meter.uses = lambda: uses
        assert meter.tokens_per_s() == pytest.approx(100 / 0.9 * 5 * 20.0 / FILL_S), "a request has five chunks"


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> TraceMaker:
    return TraceMaker(make_tiny_target(tmp_path_factory.mktemp("models") / "target"))


def test_the_meter_counts_what_replay_has_and_how_fast_training_reads(maker: TraceMaker, tmp_path: Path) -> None:
    limits = ReplayLimits.of(10**8)
    with Replay.open(tmp_path / "replay", limits=limits, expected=maker.expected, cache_bytes=0) as replay:
        meter = DemandMeter(replay, limits, num_held_out=0, max_uses=2)
        first = meter.tokens_per_s()
        assert first == pytest.approx(128 / 0.9 * FIRST_REQUEST_TOKENS / FILL_S)
        admit(replay, maker, 128)
        assert meter.tokens_per_s() == 0.0, "no speed is known, and no request is missing"
        ids = replay.training_ids()

        meter.trained([10, 30], start_s=0.0, end_s=1.0)
        meter.trained([20, 20], start_s=2.0, end_s=3.0)
        meter.paused()
        meter.trained([20, 20], start_s=100.0, end_s=101.0)

        used_up = 30.0 * FRESH_SHARE / 2
        backlog_s = 128 * 2 * 20.0 / (FRESH_SHARE * 30.0)
        assert meter.tokens_per_s() == pytest.approx(used_up * BURST ** (1 - backlog_s / BACKLOG_S), rel=0.05)
        meter.uses = lambda: dict.fromkeys(ids, 2)
        assert meter.tokens_per_s() == pytest.approx(BURST * used_up, rel=0.05)


REQUEST_TOKENS_PER_S = 100.0
"""Tokens per second of one request, which is captured as it runs: what was chosen comes in for a minute."""


@dataclass(kw_only=True)
class Fleet:
    """Pods with a real bucket, whose requests have 256 to 4,096 tokens, and an intake of a stream that holds `stream` tokens.
    Intake's speed varies by a fifth, and it is slower by half when its batches are not full."""

    speed: float
    stream: float
    traffic: float
    usable: float
    seed: int
    bucket: TokenBucket = field(default_factory=TokenBucket)
    running: list[float] = field(default_factory=list)
    waiting: float = 0.0
    due: float = 0.0
    granted: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    def run(self, seconds: int) -> None:
        rng, measured = random.Random(self.seed), IntakeSpeed()
        self.bucket.grant(self.usable, 0.0)
        for now_s in range(seconds):
            self.send(rng, float(now_s))
            self.store(self.speed * rng.uniform(0.8, 1.2), measured)
            if now_s % 2 == 0:
                self.granted.append(min(self.usable, storable(measured.tokens_per_s, self.waiting / self.stream)))
            if len(self.granted) > 2:  # the demand is four seconds old when pods hear of it, and never below 100
                self.bucket.grant(max(100.0, self.granted[-3]), float(now_s))

    def send(self, rng: random.Random, now_s: float) -> None:
        """One second of traffic."""
        self.due += self.traffic
        while self.due > 0:
            tokens = math.exp(rng.uniform(math.log(256), math.log(4096)))
            self.due -= tokens
            if rng.random() < self.bucket.level(now_s):
                self.bucket.charge(tokens)
                self.running.append(tokens)
        self.waiting += sum(min(left, REQUEST_TOKENS_PER_S) for left in self.running)
        self.running = [left - REQUEST_TOKENS_PER_S for left in self.running if left > REQUEST_TOKENS_PER_S]

    def store(self, speed: float, measured: IntakeSpeed) -> None:
        """One second of intake; the stream drops what is too much for it."""
        tokens = min(self.waiting, speed)
        self.waiting -= tokens
        self.lost.append(max(0.0, self.waiting - self.stream))
        self.waiting -= self.lost[-1]
        if tokens:
            measured.stored(round(tokens), min(1.0, 1.5 * tokens / speed))
        self.stored.append(tokens)


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0.2, 0.95), stream_s=st.floats(8.0, 300.0), seed=st.integers(0, 1000))
def test_an_intake_slower_than_pods_loses_nothing_after_the_first_minutes_and_stays_busy(
    share: float, stream_s: float, seed: int
) -> None:
    speed = share * 10_000.0
    fleet = Fleet(speed=speed, stream=max(64_000.0, stream_s * speed), traffic=10_000.0, usable=10_500.0, seed=seed)
    fleet.run(900)
    assert sum(fleet.lost[180:]) == 0.0
    assert sum(fleet.stored[180:]) > 0.8 * speed * 720


@settings(max_examples=10, deadline=None)
@given(times=st.floats(2.0, 100.0), usable=st.floats(10_500.0, 1e6), seed=st.integers(0, 1000))
def test_an_intake_twice_as_fast_as_pods_is_never_throttled(times: float, usable: float, seed: int) -> None:
    fleet = Fleet(speed=times * 10_000.0, stream=64_000.0, traffic=10_000.0, usable=usable, seed=seed)
    fleet.run(600)
    assert min(fleet.granted) >= fleet.traffic
    assert sum(fleet.lost) == 0.0


@given(speed=st.floats(0.0, 1e6), fullness=st.floats(0.0, 2.0), more=st.floats(0.0, 1.0))
def test_a_fuller_stream_never_raises_what_can_be_stored(speed: float, fullness: float, more: float) -> None:
    assert 0.0 <= storable(speed, fullness + more) <= storable(speed, fullness) <= HEADROOM * speed


def test_an_intake_that_has_stored_nothing_yet_is_not_limited_until_its_stream_is_half_full() -> None:
    assert storable(None, 0.9 * FULL_SHARE) == math.inf
    assert storable(None, FULL_SHARE) == 0.0


def test_the_speed_of_intake_is_that_of_its_busy_time() -> None:
    speed = IntakeSpeed()
    speed.stored(100, 0.1)
    assert speed.tokens_per_s is None, "a tenth of a second says little"
    for _ in range(20):
        speed.stored(100, 0.1)
    assert speed.tokens_per_s == pytest.approx(1000.0)
    for _ in range(200):
        speed.stored(500, 1.0)
    assert speed.tokens_per_s == pytest.approx(500.0, rel=0.01), "it follows a change"

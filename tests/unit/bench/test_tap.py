"""From samples to the bars of `make bench-tap`, and the stand-in by which it measures the ends of wide requests."""

import asyncio
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bench.tap import arms, endings, meter, reading, steps, swaps
from bench.tap.arms import Arm, Turn
from bench.tap.loop import Batch, Loop
from bench.tap.swaps import Swaps, Window

from updraft_cli import results
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.tap import plugin_folder
from updraft_inference.tap.server_kind import SGLANG

STEP = "Scheduler.process_batch_result"


def turn(number: int, arm: Arm, tokens_per_s: float, cpu_ms: float = 10.0, *, pair: int = 0) -> Turn:
    return Turn(round=number, pair=pair, arm=arm, tokens_per_s=tokens_per_s, cpu_ms=cpu_ms)


TURNS = [
    *(turn(0, arm, rate, cpu) for arm, rate, cpu in zip(Arm, (100, 99, 98, 96), (10, 10, 10.1, 10.3), strict=True)),
    *(turn(1, arm, rate, cpu) for arm, rate, cpu in zip(Arm, (50, 50, 49.5, 48), (20, 20, 20.2, 20.8), strict=True)),
    *(turn(0, arm, rate, pair=1) for arm, rate in zip(Arm, (98, 98, 98, 94.08), strict=True)),
    *(turn(1, arm, rate, pair=1) for arm, rate in zip(Arm, (51, 51, 51, 51), strict=True)),
]


def test_an_arm_is_compared_with_the_server_without_the_plugin_of_the_same_round_and_pair() -> None:
    slower, busier = arms.costs(TURNS, Arm.PAYLOAD)

    assert slower == pytest.approx([4, 4, 4, 0])
    assert busier == pytest.approx([3, 4, 0, 0])


async def test_each_pair_of_servers_takes_every_arm_in_each_round_beginning_with_another_and_a_first_round_warms_up() -> (
    None
):
    taken: list[tuple[int, Arm]] = []

    async def take(place: int, arm: Arm) -> tuple[float, float]:
        taken.append((place, arm))
        return float(len(taken)), 1.0

    found = await arms.turns(take, pairs=2, rounds=2)

    assert sorted(taken) == sorted((place, arm) for place in (0, 1) for arm in Arm for _ in range(3))
    assert [one.tokens_per_s for one in found] == [float(n) for n in range(9, 25)]
    assert len({taken[n][1] for n in range(0, 24, 8)}) == 3, "of the first pair"


def test_each_arm_has_its_bar_and_the_bar_says_which_is_missed() -> None:
    lines = {line.bar.name.rpartition(", ")[2]: line.bar for line in arms.lines(TURNS)}

    assert {name: bar.target for name, bar in lines.items()} == {Arm.OFF: 0.5, Arm.COUNTERS: 1.0, Arm.PAYLOAD: 3.0}
    assert [bar.met for bar in lines.values()] == [True, True, False]


def test_the_noise_is_how_much_two_servers_without_the_plugin_differ() -> None:
    assert arms.between_stock(TURNS) == pytest.approx([2, -2])
    assert "differ by +0.0 %" in arms.noise(TURNS)
    assert "not known" in arms.noise([one for one in TURNS if one.pair == 0])


LONG = (1.0, 1.25)
GAPS = [*((n / 10, (n + 1) / 10) for n in range(10)), LONG, *((1.25 + n / 10, 1.35 + n / 10) for n in range(10))]


@pytest.mark.parametrize(
    ("start_s", "end_s", "added"),
    [
        pytest.param(0.95, 1.2, 150.0, id="the longest gap within, less the longest before"),
        pytest.param(1.1, 1.11, 150.0, id="a gap that begins before and ends after"),
        pytest.param(0.51, 0.79, 0.0, id="steps like those before"),
        pytest.param(1.47, 1.75, -150.0, id="the long gap was before"),
        pytest.param(5.0, 5.1, 0.0, id="no tokens at all"),
    ],
)
def test_a_swap_adds_what_a_time_as_long_before_it_had_not(start_s: float, end_s: float, added: float) -> None:
    assert swaps.added_ms(GAPS, start_s, end_s) == pytest.approx(added)


def test_the_time_before_a_swap_is_compared_with_the_one_before_it_as_a_swap_is() -> None:
    swapped = Swaps(windows=[Window(start_s=1.47, end_s=1.75, pause_ms=3.0, refusal="")], gaps=GAPS)

    assert swapped.added_ms == pytest.approx([-150.0])
    assert swapped.added_by_nothing_ms == pytest.approx([150.0])


async def test_the_first_counted_swap_changes_the_draft_and_requests_that_end_early_end_only_their_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swaps, "BETWEEN_SWAPS_S", 0.01)
    plugin, found = Plugin(), Swaps()
    drafts = [DraftCheckpoint(folder=tmp_path, version=version, tensors_digest="sha256:d") for version in (7, 8)]

    async def tokens() -> AsyncIterator[bytes]:
        while len(plugin.versions) < 4:
            yield b'data: {"choices": [{"token_ids": [1]}]}\n\n'
            await asyncio.sleep(0.001)

    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=tokens()))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        agent: Any = plugin
        await swaps._swapped(http, agent, itertools.cycle(drafts), [((1,), [1])] * 2, found, 100)

    assert plugin.versions[:4] == [7, 8, 7, 8], "the first one is served, and is not counted"
    assert 2 <= len(found.windows) < 100
    assert (found.requests, found.failed) == (2, 0)


class Plugin:
    """The agent's connection to a plugin that answers each load at once."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.loaded: list[dict[str, Any]] = []

    def send(self, role: str, header: dict[str, Any]) -> None:
        assert role == "worker"
        self.versions.append(header["version"])
        self.loaded.append({"pause_us": 1000, "refusal": ""})


def test_a_refused_swap_and_a_changed_request_miss_their_bars() -> None:
    window = Window(start_s=1.0, end_s=1.5, pause_ms=3.0, refusal="")
    good = Swaps(windows=[window, window], gaps=[(0.9, 1.0), (1.0, 1.11), (1.11, 1.21)], requests=5)
    bad = Swaps(windows=[window, Window(start_s=1.0, end_s=1.5, pause_ms=0.0, refusal="no")], requests=5, changed=1)

    assert results.missed([line.bar for line in good.lines()]) is None
    assert [line.bar.measured for line in bad.lines()][:3] == [1, 0, 1]
    assert [line.bar.met for line in bad.lines()][:3] == [False, True, False]


def test_the_stand_in_of_width_4096_sends_what_a_server_would(short_tmp_path: Path) -> None:
    holds = endings.measured(short_tmp_path / "e", 2)

    assert (len(holds.ends_ms), len(holds.steps_ms)) == (2, 2 * endings.STEPS)
    assert holds.line().bar.measured == max(holds.ends_ms)


def test_the_loop_has_reached_its_bar_with_the_first_batch_that_drafts_so_well() -> None:
    lengths = [(0.0, 1.0), (30.0, 1.2), (30.0, 1.6), (30.0, 1.5)]
    batches = [
        Batch(ended_s=60.0 * number, version=number, steps=steps, acceptance_length=length)
        for number, (steps, length) in enumerate(lengths, 1)
    ]
    reached, missed = Loop(without=1.0, batches=batches), Loop(without=1.0, batches=batches[:2])

    assert (reached.line().bar.met, reached.line().bar.measured, reached.line().note) == (True, 1.6, "after 180 s")
    assert (missed.line().bar.met, missed.line().bar.measured, missed.line().note) == (False, 1.2, "")
    late = Loop(without=1.0, batches=[Batch(ended_s=601.0, version=1, steps=30.0, acceptance_length=1.6)])
    assert (late.line().bar.met, late.line().note) == (False, "")
    assert "nothing is drafted" in list(reached.figures())[1]


def test_a_hooks_own_time_is_without_that_of_the_engine_and_of_hooks_within(tmp_path: Path) -> None:
    now_ns = 0

    def spends(ns: int) -> None:
        nonlocal now_ns
        now_ns += ns

    def hook(own_ns: int) -> Any:
        def body(original: Any, *args: Any) -> Any:
            spends(own_ns)
            return original(*args)

        return body

    (tmp_path / "meters").mkdir()
    file = os.open(tmp_path / "meters" / "1", os.O_CREAT | os.O_WRONLY)
    timed = meter.Meter(file, clock=lambda: now_ns)
    inner, outer = (
        timed.timed(f"engine.{target}", hook(ns)) for target, ns in (("Runner.sample", 5_000), (STEP, 20_000))
    )

    def step() -> None:
        spends(700_000)
        inner(spends, 300_000)

    outer(step)
    before = steps.Sums.read(tmp_path)
    outer(step)
    outer(step)
    os.close(file)

    found = steps.Turn.of(0, Arm.OFF, steps.Sums.read(tmp_path).since(before))
    assert (found.steps, found.hooks_us, found.engine_us, found.share) == (2, 25.0, 1000.0, 2.5)
    assert found.by_hook_us == {"Runner.sample": 5.0, STEP: 20.0}


def test_an_engine_loads_the_meter_first_so_hooks_that_are_bound_later_are_timed_and_still_found_in_place(
    tmp_path: Path,
) -> None:
    environment = os.environ | steps.variables(tmp_path, SGLANG, plugin_folder.write(tmp_path / "plugin"))
    subprocess.run([sys.executable, "-c", _ENGINE, SGLANG.group], env=environment, check=True)

    (hook,) = steps.Sums.read(tmp_path).hooks.items()
    assert (hook[0], hook[1][0]) == ("TextWrapper.wrap", 2)


_ENGINE = """
import sys
import textwrap
from importlib.metadata import entry_points

from updraft_tap import hooks

next(iter(entry_points(group=sys.argv[1]))).load()()
binding = hooks.Binding(
    target="textwrap.TextWrapper.wrap", hook=lambda original, *args: original(*args), parameters=("self", "text")
)
assert hooks.install([binding]) == hooks.states([binding]) == {binding.target: ""}
for _ in range(2):
    assert textwrap.TextWrapper(width=9).wrap("some words") == ["some", "words"]
"""


def test_the_share_of_the_hooks_has_the_bar_of_its_arm() -> None:
    def taken(number: int, arm: Arm, hooks_us: float) -> steps.Turn:
        by_hook_us = {STEP: hooks_us}
        return steps.Turn(
            round=number, arm=arm, steps=48, hooks_us=hooks_us, by_hook_us=by_hook_us, engine_us=1e4, sender_us=7.0
        )

    turns = [taken(n, arm, us + n) for n in range(3) for arm, us in zip(arms.MOST, (49, 99, 300), strict=True)]

    lines = steps.lines(turns)

    assert [line.bar.measured for line in lines] == pytest.approx([0.5, 1.0, 3.01])
    assert [(line.bar.target, line.bar.met) for line in lines] == [(0.5, True), (1.0, True), (3.0, False)]
    assert lines[0].note == "50 of 10000 us; 7 us more on the thread that sends"
    assert next(steps.figures(turns)) == f"traces off: {STEP} 50.0 us"


def test_a_thread_that_cannot_look_at_the_clock_has_a_gap_and_the_note_says_what_other_programs_cause() -> None:
    clock = reading.Clock()
    thread = threading.Thread(target=clock.watch)
    thread.start()
    try:
        clock.looks.wait()
        pattern = re.compile("(a*)*b")  # one call that keeps the interpreter's lock, for longer with each letter
        assert clock.gap_ms(lambda: pattern.match("a" * 22)) > 0
    finally:
        clock.is_over = True
        thread.join()

    line = reading.Gaps(reading_ms=[20.0, 40.0, 41.0], nothing_ms=[1.0, 2.0, 3.0]).line()
    assert (line.bar.measured, line.bar.met, line.note) == (38.0, False, "40.0 ms; 2.0 ms without work")

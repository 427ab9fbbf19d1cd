"""A trainer that is killed at any step, any number of times, loses no trace, and its weights have each counted use once.

So does one of two ranks, either of which is killed.
"""

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.dying_ranks import SIZE, rank_life
from tests.support.dying_trainer import MAX_USES, Life, acked, data_of, request
from tests.support.states import IDENTITY
from tests.support.traces import TraceMaker

from updraft_trainer.data.replay import INDEX, Replay
from updraft_trainer.states.state import States

pytestmark = pytest.mark.lasts(120)

ROOMY = 10 * 1024**2


@contextmanager
def lives(module: str, target: Path) -> Iterator[Callable[[Life], Any]]:
    """Runs a life in a process of its own; returns its number of steps, or None if it was killed."""
    command = [sys.executable, "-m", f"tests.support.{module}", str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == '"ready"\n'
        stdin, stdout = process.stdin, process.stdout

        def run(life: Life) -> Any:
            stdin.write(request(life))
            stdin.flush()
            return json.loads(stdout.readline())

        yield run
        stdin.close()


@pytest.fixture(scope="module")
def run(tiny_target: Path) -> Iterator[Callable[[Life], int | None]]:
    with lives("dying_trainer", tiny_target) as run:
        yield run


@pytest.fixture(scope="module")
def run_ranks(tiny_target: Path) -> Iterator[Callable[[Life], list[int] | None]]:
    """Returns the steps of both ranks."""
    with lives("dying_ranks", tiny_target) as run:
        yield run


def ids(folder: Path, table: str) -> set[str]:
    index = folder / "replay" / INDEX
    with closing(sqlite3.connect(index)) as db:
        return {trace_id for (trace_id,) in db.execute(f"SELECT trace_id FROM {table}")}  # noqa: S608 - a constant


def check(life: Life, traces: TraceMaker) -> None:
    """Everything that has to hold whenever a trainer starts."""
    admitted, trained_on = check_replay(life, traces)
    check_uses(life, traces, admitted, trained_on)


def check_ranks(life: Life, traces: TraceMaker) -> None:
    """The same of both ranks, of whose uses the first one has the state."""
    found = [check_replay(rank_life(life, rank), traces) for rank in range(SIZE)]
    admitted, trained_on = set().union(*(one for one, _ in found)), [id_ for _, ids in found for id_ in ids]
    check_uses(rank_life(life, 0), traces, admitted, trained_on)


def names_of(life: Life, traces: TraceMaker) -> dict[int, str]:
    return {n: traces.trace(n, evaluation=n % 5 == 4).header.trace_id.hex() for n in range(life.num_traces)}


def check_replay(life: Life, traces: TraceMaker) -> tuple[set[str], list[str]]:
    """Returns the ids that were ever stored, and those that may be trained on."""
    settled = acked(life.path)
    assert len(set(settled)) == len(settled)
    names = names_of(life, traces)
    opened = Replay.open(life.path / "replay", limits=life.limits, expected=traces.expected, cache_bytes=0)
    with opened as replay:
        trained_on = replay.training_ids()
        assert replay.take_damaged() == 0
    stored, admitted = ids(life.path, "samples"), ids(life.path, "seen")
    assert stored <= admitted
    assert {names[n] for n in settled} <= (stored if life.max_bytes == ROOMY else admitted), "a trace was lost"
    return admitted, trained_on


def check_uses(life: Life, traces: TraceMaker, admitted: set[str], trained_on: list[str]) -> None:
    names = names_of(life, traces)
    state = States(life.path / "states").load(IDENTITY)
    if state is None:
        return
    uses = Counter(names[n] for n in state.learner["trail"].tolist())
    assert set(uses) <= admitted, "the weights come from a trace that is not on disk"
    assert {name: uses[name] for name in trained_on if uses[name]} == {
        name: count for name, count in state.history.uses.items() if name in trained_on
    }, "a use is in the weights and not counted, or the other way round"


@settings(max_examples=12, deadline=None)
@given(
    num_traces=st.integers(1, 24),
    is_roomy=st.booleans(),
    moments=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4),
)
def test_no_trace_is_lost_or_trained_with_twice_whenever_a_trainer_is_killed(
    tmp_path_factory: pytest.TempPathFactory,
    traces: TraceMaker,
    run: Callable[[Life], int | None],
    num_traces: int,
    is_roomy: bool,  # noqa: FBT001 - drawn by hypothesis
    moments: list[float],
) -> None:
    folder = tmp_path_factory.mktemp("kills")
    max_bytes = ROOMY if is_roomy else 12 * len(data_of(traces, 0))
    life = Life(folder=str(folder / "killed"), num_traces=num_traces, max_bytes=max_bytes)
    for path in (folder / "whole", life.path):
        path.mkdir()
    num_steps = run(replace(life, folder=str(folder / "whole")))
    assert num_steps is not None
    for moment in moments:
        run(replace(life, fatal_step=1 + int(moment * num_steps)))
        check(life, traces)
    assert run(life) is not None
    check(life, traces)
    assert sorted(acked(life.path)) == list(range(num_traces))
    state = States(life.path / "states").load(IDENTITY)
    assert state is not None
    training = [n for n in range(num_traces) if n % 5 != 4]
    if is_roomy:
        uses = Counter(state.learner["trail"].tolist())
        assert sorted(uses) == training
        assert min(uses.values(), default=MAX_USES) >= MAX_USES, "older ones are used again beside fresh ones"
    assert not (life.path / "states" / "state.part").exists()
    assert len(list((life.path / "states").iterdir())) <= 2


def test_no_trace_is_lost_or_trained_with_twice_whenever_one_of_two_ranks_is_killed(
    tmp_path_factory: pytest.TempPathFactory, traces: TraceMaker, run_ranks: Callable[[Life], list[int] | None]
) -> None:
    kills = list[bool]()

    @settings(max_examples=6, deadline=None)
    @given(
        num_traces=st.integers(2, 24),
        moments=st.lists(st.tuples(st.integers(0, SIZE - 1), st.floats(0.0, 1.0)), min_size=1, max_size=3),
    )
    def live_and_die(num_traces: int, moments: list[tuple[int, float]]) -> None:
        folder = tmp_path_factory.mktemp("kills")
        life = Life(folder=str(folder / "killed"), num_traces=num_traces, max_bytes=ROOMY)
        for path in (folder / "whole", life.path):
            path.mkdir()
        num_steps = run_ranks(replace(life, folder=str(folder / "whole")))
        assert num_steps is not None
        for rank, moment in moments:
            fatal_step = 1 + int(moment * num_steps[rank])
            kills.append(run_ranks(replace(life, fatal_rank=rank, fatal_step=fatal_step)) is None)
            check_ranks(life, traces)
        assert run_ranks(life) is not None
        check_ranks(life, traces)
        check_end_of_ranks(life)

    live_and_die()
    assert any(kills)


def check_end_of_ranks(life: Life) -> None:
    """After a life that nothing ended early."""
    settled = [n for rank in range(SIZE) for n in acked(rank_life(life, rank).path)]
    assert sorted(settled) == list(range(life.num_traces))
    state = States(rank_life(life, 0).path / "states").load(IDENTITY)
    assert state is not None
    uses = Counter(state.learner["trail"].tolist())
    assert sorted(uses) == [n for n in range(life.num_traces) if n % 5 != 4]
    assert min(uses.values()) >= MAX_USES

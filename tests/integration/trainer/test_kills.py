"""A trainer of one or two ranks, one of which is killed at any step, any number of times, loses no trace, and its weights have
each counted use once."""

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.lives import MAX_USES, Life, acked, data_of, names_of, request
from tests.support.states import IDENTITY
from tests.support.traces import TraceMaker

from updraft_trainer.data.replay import INDEX, Replay
from updraft_trainer.states.state import States

pytestmark = pytest.mark.lasts(120)

ROOMY = 10 * 1024**2


@pytest.fixture(scope="module")
def run(tiny_target: Path) -> Iterator[Callable[[Life], list[int] | None]]:
    """Runs a life in processes of its own; returns the number of steps of each rank, or None if one was killed."""
    command = [sys.executable, "-m", "tests.support.dying_trainer", str(tiny_target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == '"ready"\n'
        stdin, stdout = process.stdin, process.stdout

        def run(life: Life) -> list[int] | None:
            stdin.write(request(life))
            stdin.flush()
            steps: list[int] | None = json.loads(stdout.readline())
            return steps

        yield run
        stdin.close()


def ids(folder: Path, table: str) -> set[str]:
    index = folder / "replay" / INDEX
    with closing(sqlite3.connect(index)) as db:
        return {trace_id for (trace_id,) in db.execute(f"SELECT trace_id FROM {table}")}  # noqa: S608 - a constant


def check(life: Life, traces: TraceMaker) -> None:
    """Everything that has to hold whenever a trainer starts. Rank 0 has the states."""
    found = [check_replay(life, folder, traces) for folder in life.folders if folder.exists()]
    admitted, trained_on = set().union(*(one for one, _ in found)), [id_ for _, ids in found for id_ in ids]
    state = States(life.folders[0] / "states").load(IDENTITY)
    if state is None:
        return
    names = names_of(traces, life.num_traces)
    uses = Counter(names[n] for n in state.learner["trail"].tolist())
    assert set(uses) <= admitted, "the weights come from a trace that is not on disk"
    assert {name: uses[name] for name in trained_on if uses[name]} == {
        name: count for name, count in state.history.uses.items() if name in trained_on
    }, "a use is in the weights and not counted, or the other way round"


def check_replay(life: Life, folder: Path, traces: TraceMaker) -> tuple[set[str], list[str]]:
    """Returns the ids that one rank ever stored, and those that it may train on."""
    settled = acked(folder)
    assert len(set(settled)) == len(settled)
    names = names_of(traces, life.num_traces)
    opened = Replay.open(folder / "replay", limits=life.limits, expected=traces.expected, cache_bytes=0)
    with opened as replay:
        trained_on = replay.training_ids()
        assert replay.take_damaged() == 0
    stored, admitted = ids(folder, "samples"), ids(folder, "seen")
    assert stored <= admitted
    assert {names[n] for n in settled} <= (stored if life.max_bytes == ROOMY else admitted), "a trace was lost"
    return admitted, trained_on


def check_end(life: Life) -> None:
    """After a life that nothing ended early."""
    assert sorted(life.acked) == list(range(life.num_traces))
    state = States(life.folders[0] / "states").load(IDENTITY)
    assert state is not None
    if life.max_bytes == ROOMY:
        uses = Counter(state.learner["trail"].tolist())
        assert sorted(uses) == [n for n in range(life.num_traces) if n % 5 != 4]
        assert min(uses.values(), default=MAX_USES) >= MAX_USES, "older ones are used again beside fresh ones"
    assert not (life.folders[0] / "states" / "state.part").exists()
    assert len(list((life.folders[0] / "states").iterdir())) <= 2


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_trace_is_lost_or_trained_with_twice_whenever_a_rank_is_killed(
    tmp_path_factory: pytest.TempPathFactory,
    traces: TraceMaker,
    run: Callable[[Life], list[int] | None],
    num_ranks: int,
) -> None:
    kills = list[bool]()

    @settings(max_examples=12 // num_ranks, deadline=None)
    @given(
        num_traces=st.integers(num_ranks, 24),
        is_roomy=st.booleans(),
        moments=st.lists(st.tuples(st.integers(0, num_ranks - 1), st.floats(0.0, 1.0)), min_size=1, max_size=4),
    )
    def live_and_die(
        num_traces: int,
        is_roomy: bool,  # noqa: FBT001 - drawn by hypothesis
        moments: list[tuple[int, float]],
    ) -> None:
        folder = tmp_path_factory.mktemp("kills")
        max_bytes = ROOMY if is_roomy else 12 * len(data_of(traces, 0))
        life = Life(folder=str(folder / "killed"), num_traces=num_traces, max_bytes=max_bytes, num_ranks=num_ranks)
        for path in (folder / "whole", folder / "killed"):
            path.mkdir()
        num_steps = run(replace(life, folder=str(folder / "whole")))
        assert num_steps is not None
        for rank, moment in moments:
            fatal_step = 1 + int(moment * num_steps[rank])
            kills.append(run(replace(life, fatal_rank=rank, fatal_step=fatal_step)) is None)
            check(life, traces)
        assert run(life) is not None
        check(life, traces)
        check_end(life)

    live_and_die()
    assert any(kills)

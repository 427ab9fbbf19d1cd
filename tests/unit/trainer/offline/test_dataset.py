"""Folders of traces: what can be read, and how samples are split by request."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.tiny_target import make_tiny_target
from tests.support.traces import TraceMaker

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import Conflict, Corrupt, InvalidInput
from updraft_draft import recordings
from updraft_trainer.data.replay import INDEX, IncomingTrace, Replay
from updraft_trainer.data.retention import ReplayLimits, request_of
from updraft_trainer.data.sample import read_sample
from updraft_trainer.offline import dataset as module
from updraft_trainer.offline.dataset import Dataset, read_dataset


def read(traces: TraceMaker, *folders: Path) -> Dataset:
    return read_dataset(folders, traces.expected, lambda _: None)


def record(folder: Path, made: Sequence[trace_pb2.Trace]) -> Path:
    for number, trace in enumerate(made):
        recordings.write(folder, f"{number:03}", trace)
    return folder


def prompts(traces: TraceMaker, count: int) -> list[trace_pb2.Trace]:
    """Traces whose prompts all differ."""
    every = (traces.trace(seed, rule=rule) for rule, seed in itertools.product(range(9), range(64)))
    different = {tuple(trace.prompt_ids): trace for trace in itertools.islice(every, 3 * count)}
    return list(different.values())[:count]


@contextmanager
def replay(folder: Path, traces: TraceMaker, made: Sequence[trace_pb2.Trace]) -> Iterator[Replay]:
    limits = ReplayLimits.of(10 * 1024**2)
    with Replay.open(folder, limits=limits, expected=traces.expected, cache_bytes=0) as opened:
        all_bytes = [trace.SerializeToString() for trace in made]
        opened.admit([IncomingTrace(sample=read_sample(data, traces.expected), data=data) for data in all_bytes])
        yield opened


def ids(dataset: Dataset) -> tuple[set[str], set[str]]:
    return ({one.trace_id for one in dataset.training}, {one.trace_id for one in dataset.held_out})


@pytest.mark.parametrize("place", ["", "replay", "trainer/replay"])
def test_a_replay_is_found_in_its_own_folder_its_trainers_and_that_of_a_stack(
    traces: TraceMaker, tmp_path: Path, place: str
) -> None:
    made = prompts(traces, 24)
    (tmp_path / "data").mkdir()
    with replay(tmp_path / "data" / place, traces, made):
        pass
    training, held_out = ids(read(traces, tmp_path / "data"))
    assert training | held_out == {trace.header.trace_id.hex() for trace in made}


def test_the_replay_of_a_running_trainer_can_be_read_and_is_left_as_it_is(traces: TraceMaker, tmp_path: Path) -> None:
    with replay(tmp_path / "replay", traces, prompts(traces, 24)) as running:
        assert len(read(traces, tmp_path).training) == 21
        running.admit([])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    read(traces, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_folders_are_read_together_and_each_text_once(traces: TraceMaker, tmp_path: Path) -> None:
    made = prompts(traces, 40)
    with replay(tmp_path / "replay", traces, made[:30]):
        pass
    dataset = read(traces, tmp_path / "replay", record(tmp_path / "recordings", made[20:]))
    assert len(dataset.training) + len(dataset.held_out) == 40
    assert dataset.refused == {"another one has the same text": 10}


def test_one_of_eight_requests_is_held_out_and_equal_prompts_are_on_one_side(
    traces: TraceMaker, tmp_path: Path
) -> None:
    made = prompts(traces, 64)
    for number, (first, second) in enumerate(
        zip(made[::2], made[1::2], strict=True)
    ):  # two answers to each of 32 prompts
        second.prompt_ids[:] = first.prompt_ids
        first.header.request_id = second.header.request_id = str(number)
    dataset = read(traces, record(tmp_path, made))
    assert len(dataset.held_out) == 8
    sides = [{one.prompt for one in side} for side in (dataset.training, dataset.held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 4


def test_the_split_is_the_same_each_time(traces: TraceMaker, tmp_path: Path) -> None:
    made = prompts(traces, 40)
    first = read(traces, record(tmp_path / "a", made))
    assert ids(first) == ids(read(traces, record(tmp_path / "b", made[::-1])))
    assert first.digest == read(traces, tmp_path / "a").digest
    assert first.digest != read(traces, record(tmp_path / "c", made[:39])).digest


def test_what_pods_held_out_is_never_trained_on(traces: TraceMaker, tmp_path: Path) -> None:
    made = prompts(traces, 40)
    for trace in made[:20]:
        trace.header.evaluation = True
    training, held_out = ids(read(traces, record(tmp_path, made)))
    assert held_out == {trace.header.trace_id.hex() for trace in made[:20]}
    assert training == {trace.header.trace_id.hex() for trace in made[20:]}


def test_the_chunks_of_a_request_are_on_one_side_and_one_of_them_judges(traces: TraceMaker, tmp_path: Path) -> None:
    made = prompts(traces, 64)
    for first, second in zip(made[::2], made[1::2], strict=True):
        second.header.trace_id = first.header.trace_id
        second.header.chunk = 24
    training, held_out = ids(read(traces, record(tmp_path, made)))
    assert not {request_of(one) for one in training} & {request_of(one) for one in held_out}
    assert len(held_out) == 4
    assert len(training) == 56


def test_there_are_at_most_so_many_judges_and_the_others_teach(
    traces: TraceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_JUDGES", 3)
    dataset = read(traces, record(tmp_path, prompts(traces, 40)))
    assert (len(dataset.training), len(dataset.held_out)) == (37, 3)


def test_a_text_that_pods_held_out_is_never_trained_on_although_it_also_came_for_training(
    traces: TraceMaker, tmp_path: Path
) -> None:
    made = prompts(traces, 40)
    record(tmp_path / "a", made)
    again = [trace_pb2.Trace.FromString(trace.SerializeToString()) for trace in made[:20]]
    for number, trace in enumerate(again):
        trace.header.trace_id, trace.header.evaluation = number.to_bytes(16), True
    training, held_out = ids(read(traces, tmp_path / "a", record(tmp_path / "b", again)))
    assert held_out == {trace.header.trace_id.hex() for trace in made[:20]}
    assert training == {trace.header.trace_id.hex() for trace in made[20:]}


def test_requests_with_the_prompt_of_one_that_pods_held_out_are_held_out_too(
    traces: TraceMaker, tmp_path: Path
) -> None:
    made = prompts(traces, 64)
    for first, second in zip(made[:20:2], made[1:20:2], strict=True):
        second.prompt_ids[:] = first.prompt_ids
        second.header.evaluation = True
    dataset = read(traces, record(tmp_path, made))
    assert not {one.prompt for one in dataset.training} & {one.prompt for one in dataset.held_out}
    assert ids(dataset)[1] == {trace.header.trace_id.hex() for trace in made[:20]}


def test_prompts_that_are_all_held_out_by_pods_are_too_few_to_learn_from(traces: TraceMaker, tmp_path: Path) -> None:
    made = prompts(traces, 40)
    for first, second in zip(made[::2], made[1::2], strict=True):
        second.prompt_ids[:] = first.prompt_ids
        second.header.evaluation = True
    with pytest.raises(InvalidInput, match="holds 0 prompts to learn from, fewer than 16"):
        read(traces, record(tmp_path, made))


def test_a_later_chunk_has_its_requests_prompt_although_the_first_one_is_a_repeated_text(
    traces: TraceMaker, tmp_path: Path
) -> None:
    made = prompts(traces, 40)
    first = trace_pb2.Trace.FromString(made[0].SerializeToString())  # answered in the same way, then differently
    made[1].header.chunk = 24
    first.header.trace_id = made[1].header.trace_id = bytes(16)
    dataset = read(traces, record(tmp_path, [*made, first]))
    found = {one.trace_id: one.prompt for one in [*dataset.training, *dataset.held_out]}
    (later,) = (prompt for trace_id, prompt in found.items() if trace_id.startswith(bytes(16).hex()))
    assert later == found[made[0].header.trace_id.hex()]


def test_judges_are_chosen_by_chance_whatever_the_order_of_the_traces(
    traces: TraceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_JUDGES", 6)
    made = prompts(traces, 60)
    for first, second in zip(made[:40:2], made[1:40:2], strict=True):
        first.header.evaluation = second.header.evaluation = True
        second.header.trace_id, second.header.chunk = first.header.trace_id, 24
    judges = ids(read(traces, record(tmp_path / "a", made)))[1]
    assert judges == ids(read(traces, record(tmp_path / "b", made[::-1])))[1]
    assert {"#" in one for one in judges} == {True, False}, "of both the first chunks and the later ones"


def test_damaged_traces_are_counted_and_lose_nothing_else(traces: TraceMaker, tmp_path: Path) -> None:
    made = prompts(traces, 40)
    made[1].ClearField("payload")
    record(tmp_path, made)
    recordings.path(tmp_path, "000").write_bytes(b"broken")
    dataset = read(traces, tmp_path)
    assert len(dataset.training) + len(dataset.held_out) == 38
    assert dataset.refused == {"it is damaged": 1, "the trace carries no hidden states": 1}


def test_a_trace_that_is_damaged_later_is_left_out_of_its_batch(traces: TraceMaker, tmp_path: Path) -> None:
    dataset = read(traces, record(tmp_path, prompts(traces, 24)))
    recordings.path(tmp_path, "000").unlink()
    items = [*dataset.training, *dataset.held_out]
    read_again = {sample.trace_id for sample in dataset.read(items)}
    assert dataset.gone == {item.trace_id for item in items} - read_again
    assert len(dataset.gone) == 1


@pytest.mark.parametrize("name", ["replay", "recordings"])
def test_traces_of_another_target_are_refused_in_a_sentence(traces: TraceMaker, tmp_path: Path, name: str) -> None:
    other = TraceMaker(make_tiny_target(tmp_path / "target", seed=7))
    assert other.target_fingerprint != traces.target_fingerprint
    made = prompts(other, 24)
    record(tmp_path / "recordings", made)
    with (
        replay(tmp_path / "replay", other, made),
        pytest.raises(Conflict, match=r"holds traces of the target sha256:|holds recordings of another model"),
    ):
        read(traces, tmp_path / name)


def test_traces_of_another_width_are_not_used_and_the_reason_is_told(traces: TraceMaker, tmp_path: Path) -> None:
    record(tmp_path, prompts(traces, 24))
    wide = replace(traces.expected, aux_size=12)
    with pytest.raises(InvalidInput, match=r"24 not used because auxiliary hidden states of width \d+, expected 12"):
        read_dataset([tmp_path], wide, lambda _: None)


def test_traces_that_may_not_leave_their_region_are_used_only_there(traces: TraceMaker, tmp_path: Path) -> None:
    made = prompts(traces, 24)
    for trace in made:
        trace.header.policy.region = "eu"
    record(tmp_path, made)
    with pytest.raises(InvalidInput, match="may be stored in 'eu' only; this trainer has no region"):
        read(traces, tmp_path)
    here = replace(traces.expected, region="eu")
    assert read_dataset([tmp_path], here, lambda _: None).training


def test_a_folder_without_traces_is_an_error(traces: TraceMaker, tmp_path: Path) -> None:
    (tmp_path / "film").touch()
    with pytest.raises(InvalidInput, match="holds no traces: name a folder of recordings, or the data folder of a"):
        read(traces, tmp_path)


def test_an_index_that_is_no_database_is_an_error(traces: TraceMaker, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b"no database" * 100)
    with pytest.raises(Corrupt, match=r"index.sqlite cannot be read: file is not a database"):
        read(traces, tmp_path)


def test_too_few_different_prompts_are_an_error_that_says_what_is_missing(traces: TraceMaker, tmp_path: Path) -> None:
    made = [traces.trace(number % 3) for number in range(40)]
    with pytest.raises(InvalidInput) as refused:
        read(traces, record(tmp_path, made))
    assert str(refused.value) == (
        f"{tmp_path} holds 3 prompts to learn from, fewer than 16 (37 not used because another one has the same text):"
        " record more requests"
    )

import errno
import os
import random
import shutil
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.disk import file_size_limit, no_file_opens
from tests.support.likeliest import show_likeliest
from tests.support.traces import TraceMaker

from updraft_chassis.errors import Conflict, Corrupt, Exhausted
from updraft_draft.target_weights import read_head
from updraft_rollouts.evidence import MIN_KIND_SAMPLES, OUTLIERS
from updraft_trainer.data import segments as segments_module
from updraft_trainer.data.clusters import MAX_CLUSTERS
from updraft_trainer.data.replay import INDEX, IncomingTrace, Replay
from updraft_trainer.data.retention import CHUNK_MARK, Pool, ReplayLimits
from updraft_trainer.data.sample import read_sample
from updraft_trainer.data.teacher import LastHidden, TopK

ROOMY = 10 * 1024**2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "replay"


TRACE_TOKENS = 27
"""Of most traces here."""


def opened(
    path: Path, traces: TraceMaker, *, max_bytes: int = ROOMY, cache_bytes: int = ROOMY
) -> AbstractContextManager[Replay]:
    return Replay.open(path, limits=ReplayLimits.of(max_bytes), expected=traces.expected, cache_bytes=cache_bytes)


def arrival(traces: TraceMaker, seed: int, **kwargs: bool | int | str) -> IncomingTrace:
    data = traces.data(seed, **kwargs)
    return IncomingTrace(sample=read_sample(data, traces.expected), data=data)


def draw(replay: Replay, uses: Counter[str], *, count: int = 4, max_uses: int = 6) -> list[str]:
    batch = replay.training_batch(uses, num_tokens=count * TRACE_TOKENS, max_uses=max_uses, rng=random.Random(0))
    return [sample.trace_id for sample in batch]


def test_an_admitted_trace_comes_back_as_it_was(path: Path, traces: TraceMaker) -> None:
    one = arrival(traces, 1)
    with opened(path, traces) as replay:
        assert replay.admit([one]) == [one.sample]
    with opened(path, traces) as replay:
        (sample,) = replay.training_batch({}, max_uses=6, rng=random.Random(0))
    assert sample.trace_id == one.sample.trace_id
    assert sample.ids.equal(one.sample.ids)
    assert sample.aux.decoded().equal(one.sample.aux.decoded())


def test_a_file_holds_both_forms_of_the_teacher(path: Path, traces: TraceMaker, tiny_target: Path) -> None:
    """A trace of an older version does not state its teacher's first row, and can still be read."""
    old = arrival(traces, 1)
    data = show_likeliest(traces.trace(2), read_head(tiny_target).head, k=6).SerializeToString()
    new = IncomingTrace(sample=read_sample(data, traces.expected), data=data)
    with opened(path, traces) as replay:
        replay.admit([old])
    with opened(path, traces) as replay:
        replay.admit([new])
    with opened(path, traces, cache_bytes=0) as replay:
        ids = {sample.trace_id: sample for sample in replay.training_batch({}, max_uses=6, rng=random.Random(0))}
    hidden, likeliest = ids[old.sample.trace_id].teacher, ids[new.sample.trace_id].teacher
    assert isinstance(hidden, LastHidden)
    assert isinstance(likeliest, TopK)
    assert likeliest.ids.shape == (24, 6)
    assert ids[new.sample.trace_id].first_teacher_row == 3


def test_a_redelivered_trace_is_not_admitted_again(path: Path, traces: TraceMaker) -> None:
    with opened(path, traces) as replay:
        assert len(replay.admit([arrival(traces, 1), arrival(traces, 2), arrival(traces, 1)])) == 2
        assert replay.admit([arrival(traces, 1)]) == []
    with opened(path, traces) as replay:
        assert replay.admit([arrival(traces, 1)]) == []
        assert len(replay.training_ids()) == 2


def test_an_evicted_trace_is_still_known(path: Path, traces: TraceMaker) -> None:
    size = len(arrival(traces, 0).data)
    with opened(path, traces, max_bytes=10 * size) as replay:
        for seed in range(40):
            replay.admit([arrival(traces, seed)])
        gone = set(range(40)) - {s for s in range(40) if arrival(traces, s).sample.trace_id in replay.training_ids()}
        assert gone
        assert replay.admit([arrival(traces, seed) for seed in gone]) == []


def test_held_out_samples_are_evaluated_on_and_never_drawn(path: Path, traces: TraceMaker) -> None:
    held_out = [arrival(traces, seed, evaluation=True) for seed in range(5)]
    with opened(path, traces) as replay:
        replay.admit([*held_out, *(arrival(traces, seed) for seed in range(3))])
        assert replay.num_held_out == 5
        uses = Counter[str]()
        while batch := draw(replay, uses):
            uses.update(batch)
        assert set(uses) == set(replay.training_ids())
        chosen = {sample.trace_id for sample in replay.evaluation_batch(count=32)}
    assert chosen == {one.sample.trace_id for one in held_out}
    assert not chosen & set(uses)


def test_chunks_count_as_the_request_that_they_are_of(path: Path, traces: TraceMaker) -> None:
    def chunks(seed: int, *, evaluation: bool = False) -> list[IncomingTrace]:
        one = arrival(traces, seed, evaluation=evaluation)
        name = one.sample.trace_id
        samples = [replace(one.sample, trace_id=f"{name}{CHUNK_MARK}{chunk}") for chunk in range(4)]
        return [IncomingTrace(sample=sample, data=one.data) for sample in samples]

    with opened(path, traces) as replay:
        for seed in range(3):
            replay.admit(chunks(seed))
        first, *others = chunks(4, evaluation=True)
        replay.admit([first, *chunks(5, evaluation=True)])
        replay.admit(others)
        assert replay.num_requests(Pool.WINDOW, Pool.RESERVOIR) == 3
        assert sum(replay.cluster_sizes().values()) == replay.num_requests(*Pool) == 5
        assert replay.num_held_out == replay.num_requests(Pool.EVALUATION) == 2


@settings(max_examples=15, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.sampled_from(["", "code", "chat"])), max_size=40),
    restarts=st.sets(st.integers(0, 40), max_size=3),
)
def test_whatever_comes_bytes_are_bounded_and_nothing_is_admitted_twice(
    tmp_path_factory: pytest.TempPathFactory,
    traces: TraceMaker,
    arrivals: list[tuple[int, bool, str]],
    restarts: set[int],
) -> None:
    path = tmp_path_factory.mktemp("replay") / "replay"
    limits = ReplayLimits.of(12 * len(arrival(traces, 0).data))
    admitted = Counter[str]()
    for start in sorted({0, *restarts}):
        end = min((restart for restart in restarts if restart > start), default=len(arrivals))
        with Replay.open(path, limits=limits, expected=traces.expected, cache_bytes=0) as replay:
            for seed, evaluation, domain in arrivals[start:end]:
                new = replay.admit([arrival(traces, seed, evaluation=evaluation, domain=domain)])
                admitted.update(sample.trace_id for sample in new)
                assert replay.num_bytes(Pool.WINDOW) <= limits.window_bytes
                assert replay.num_bytes(Pool.RESERVOIR) <= limits.reservoir_bytes
                assert replay.num_bytes(Pool.EVALUATION) <= limits.evaluation_bytes
    assert set(admitted.values()) <= {1}
    assert len(admitted) == len({(seed, evaluation) for seed, evaluation, _ in arrivals})


def test_the_index_agrees_with_the_file(path: Path, traces: TraceMaker) -> None:
    size = len(arrival(traces, 0).data)
    with opened(path, traces, max_bytes=25 * size) as replay:
        for seed in range(50):
            replay.admit([arrival(traces, seed, evaluation=seed % 5 == 0, domain="ab"[seed % 2])])
        places = {place: (replay.num_samples(place), replay.num_bytes(place)) for place in Pool}
        drawn = draw(replay, Counter())
    with sqlite3.connect(path / INDEX) as db:
        rows = db.execute("SELECT place, COUNT(*), SUM(num_bytes) FROM samples GROUP BY place").fetchall()
    db.close()
    assert places == {Pool(place): (count, total) for place, count, total in rows}
    with opened(path, traces, max_bytes=25 * size) as replay:
        assert draw(replay, Counter()) == drawn


def test_a_smaller_limit_applies_to_what_is_there(path: Path, traces: TraceMaker) -> None:
    with opened(path, traces) as replay:
        replay.admit([arrival(traces, seed) for seed in range(20)])
    size = len(arrival(traces, 0).data)
    with opened(path, traces, max_bytes=6 * size) as replay:
        assert len(replay.training_ids()) < 6
        assert len(draw(replay, Counter())) == 4


def test_a_cluster_of_content_keeps_its_name_over_restarts_and_leaves_it_to_no_other(
    tmp_path: Path, traces: TraceMaker
) -> None:
    """Requests of any two rules are unlike; only the newest are stored, so that most names are no longer in the file."""
    max_bytes = 12 * len(arrival(traces, 0).data)

    def names(path: Path, restart_every: int) -> list[str]:
        found = []
        for start in range(0, 60, restart_every):
            with opened(path, traces, max_bytes=max_bytes) as replay, sqlite3.connect(path / INDEX) as db:
                for n in range(start, start + restart_every):
                    replay.admit([arrival(traces, n, rule=0 if n % 4 == 0 else n)])
                    found += db.execute("SELECT cluster FROM samples ORDER BY admitted DESC LIMIT 1").fetchone()
                    (num_clusters,) = db.execute("SELECT COUNT(*) FROM clusters").fetchone()
                    assert num_clusters <= MAX_CLUSTERS
            db.close()
        return found

    whole = names(tmp_path / "whole", 60)
    assert names(tmp_path / "restarted", 5) == whole
    assert all(whole.index(f"content:{number}") == number - 1 for number in {int(one[8:]) for one in whole})
    assert len(set(whole)) > 2 * MAX_CLUSTERS


def test_unlike_requests_are_one_share_of_traffic_whatever_the_names_of_their_clusters(
    path: Path, traces: TraceMaker
) -> None:
    with opened(path, traces) as replay:
        replay.admit([arrival(traces, n, domain="code", evaluation=n == 0) for n in range(12)])
        replay.admit([arrival(traces, n, rule=n, evaluation=n % 2 == 0) for n in range(20, 32)])
        assert replay.traffic_mix().shares == {"domain:code": 0.5, OUTLIERS: 0.5}
        kinds = [replay.traffic_mix().kinds[sample.trace_id] for sample in replay.evaluation_batch(count=2)]
    assert Counter(kinds) == {"domain:code": 1, OUTLIERS: MIN_KIND_SAMPLES}


def test_another_targets_replay_is_refused_with_what_to_do(path: Path, traces: TraceMaker) -> None:
    with opened(path, traces):
        pass
    other = type(traces.expected)(
        target_fingerprint="sha256:other", tokenizer_fingerprint="", aux_size=1, hidden_size=1, vocab_size=1
    )
    with (
        pytest.raises(Conflict, match="set UPDRAFT_TRAINER_DATA_DIR"),
        Replay.open(path, limits=ReplayLimits.of(ROOMY), expected=other, cache_bytes=0),
    ):
        pass


def test_a_file_that_is_no_database_is_refused(path: Path, traces: TraceMaker) -> None:
    path.mkdir()
    (path / INDEX).write_bytes(b"no database " * 1000)
    with pytest.raises(Corrupt, match="move it away"), opened(path, traces):
        pass


@given(data=st.data(), is_cut=st.booleans())
@settings(max_examples=15, deadline=None)
def test_only_traces_that_the_disk_changed_are_dropped_and_counted(
    *, tmp_path_factory: pytest.TempPathFactory, traces: TraceMaker, data: st.DataObject, is_cut: bool
) -> None:
    path = tmp_path_factory.mktemp("replay") / "replay"
    stored = [arrival(traces, seed) for seed in range(3)]
    ids = [one.sample.trace_id for one in stored]
    with opened(path, traces, cache_bytes=0) as replay:
        replay.admit(stored)
        (segment,) = segments(path)
        content = bytearray(segment.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1), label="place")
        content[place] ^= 1
        segment.write_bytes(content[:place] if is_cut else content)
        ends = [*accumulate(len(one.data) for one in stored)]
        hit = next(n for n, end in enumerate(ends) if end > place)
        intact = ids[:hit] if is_cut else ids[:hit] + ids[hit + 1 :]
        draw(replay, Counter())
        assert sorted(draw(replay, Counter())) == sorted(intact)
        assert replay.take_damaged() == len(ids) - len(intact)
        assert replay.num_samples(Pool.WINDOW) == len(intact)
        replay.admit([arrival(traces, 9)])
    with opened(path, traces, cache_bytes=0) as replay:
        assert replay.take_damaged() == 0, "the admission has dropped them for good"
        assert replay.training_ids() == [*intact, arrival(traces, 9).sample.trace_id]


def test_traces_whose_file_has_lost_its_end_are_dropped_when_replay_is_opened(path: Path, traces: TraceMaker) -> None:
    with opened(path, traces) as replay:
        replay.admit([arrival(traces, seed) for seed in range(3)])
    (segment,) = segments(path)
    os.truncate(segment, size(segment) - 1)
    with opened(path, traces) as replay:
        assert replay.take_damaged() == 1
        assert len(draw(replay, Counter())) == replay.num_samples(Pool.WINDOW) == 2


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_killed_at_any_byte_of_an_admission_what_was_admitted_before_is_there_and_the_rest_comes_again(
    tmp_path_factory: pytest.TempPathFactory, traces: TraceMaker, data: st.DataObject
) -> None:
    """An admission appends to a segment and then to the index's log; a kill leaves a beginning of that."""
    folder = tmp_path_factory.mktemp("replay")
    path, before, after = folder / "replay", folder / "before", folder / "after"
    first, second = ([arrival(traces, seed) for seed in seeds] for seeds in (range(4), range(4, 7)))
    with opened(path, traces) as replay:
        replay.admit(first)
        shutil.copytree(path, before)
        replay.admit(second)
        shutil.copytree(path, after)
    kill(before, after, lambda written: data.draw(st.integers(0, written), label="bytes written"))
    with opened(after, traces, cache_bytes=0) as replay:
        ids = replay.training_ids()
        assert ids[:4] == [one.sample.trace_id for one in first]
        assert len(ids) in (4, 7), "all of an admission or none"
        assert len(replay.admit([*first, *second])) == 7 - len(ids)
        assert len(draw(replay, Counter(), count=14)) == 7
        assert replay.take_damaged() == 0


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_killed_at_any_byte_of_reclaiming_space_every_trace_is_there(
    tmp_path_factory: pytest.TempPathFactory, traces: TraceMaker, data: st.DataObject
) -> None:
    """Traces are copied to the end, then the index says so, and only then their file is deleted."""
    folder = tmp_path_factory.mktemp("replay")
    path, before, after = folder / "replay", folder / "before", folder / "after"
    max_bytes = 40 * len(arrival(traces, 0).data)
    with opened(path, traces, max_bytes=max_bytes) as replay:
        for seed in range(9):
            replay.admit([arrival(traces, seed)])
        ids = replay.training_ids()
        shutil.copytree(path, before)
        replay._move(ids[:3])
        shutil.copytree(path, after)
    (deleted,) = {one.name for one in segments(before)} - {one.name for one in segments(after)}

    def choose(written: int) -> int:
        left = data.draw(st.integers(0, written), label="bytes written")
        if left < written:
            shutil.copy(before / deleted, after / deleted)
        return left

    kill(before, after, choose)
    with opened(after, traces, max_bytes=max_bytes, cache_bytes=0) as replay:
        assert replay.training_ids() == ids
        assert len(draw(replay, Counter(), count=18)) == 9
        assert replay.take_damaged() == 0


def kill(before: Path, after: Path, choose: Callable[[int], int]) -> None:
    """Undo all but the first bytes that were written to a folder since `before`; `choose` says how many are left."""
    names = sorted((path.name for path in after.iterdir()), key=lambda name: (not name.endswith(".segment"), name))
    grown = [(name, size(before / name), size(after / name)) for name in names if name != f"{INDEX}-shm"]
    left = choose(sum(end - start for _, start, end in grown))
    for name, start, end in grown:
        kept = min(left, end - start)
        os.truncate(after / name, start + kept)
        left -= kept


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.segment"))


@pytest.mark.parametrize("num_lives", [1, 8])
def test_space_of_evicted_traces_is_reclaimed(path: Path, traces: TraceMaker, num_lives: int) -> None:
    limits = ReplayLimits.of(48 * len(arrival(traces, 0).data))
    most = 0
    for life in range(num_lives):
        with Replay.open(path, limits=limits, expected=traces.expected, cache_bytes=0) as replay:
            for n in range(life, 200, num_lives):
                replay.admit([arrival(traces, n, evaluation=n % 7 == 0, domain="abc"[n % 3])])
                most = max(most, sum(map(size, segments(path))))
            assert replay.num_file_bytes == sum(map(size, segments(path)))
            assert len(draw(replay, Counter(), count=1000)) == len(replay.training_ids()) > 20
            assert replay.take_damaged() == 0
    assert most < 1.5 * limits.total_bytes


def test_reading_waits_for_no_admission_that_is_under_way(path: Path, traces: TraceMaker) -> None:
    with opened(path, traces, cache_bytes=0) as replay:
        replay.admit([arrival(traces, 1)])
        with replay._admitting:  # as an admission holds it while the disk is slow
            assert len(draw(replay, Counter())) == 1
            assert len(replay.untrained_batch({}, count=4)) == 1
            assert replay.num_samples(Pool.WINDOW) == 1


def test_traces_are_read_while_others_make_them_go(path: Path, traces: TraceMaker) -> None:
    """Readers find what is stored or leave it out; nothing counts as damaged because it was moved or dropped meanwhile."""
    limits = ReplayLimits.of(32 * len(arrival(traces, 0).data))
    incoming = [arrival(traces, n) for n in range(150)]
    with Replay.open(path, limits=limits, expected=traces.expected, cache_bytes=0) as replay:
        replay.admit(incoming[:1])
        admitting = threading.Thread(target=lambda: [replay.admit([one]) for one in incoming])
        admitting.start()
        while admitting.is_alive():
            assert draw(replay, Counter(), count=8)
        admitting.join()
        assert replay.take_damaged() == 0


def test_the_size_of_the_files_can_be_read_while_others_come_and_go(path: Path, traces: TraceMaker) -> None:
    limits = ReplayLimits.of(32 * len(arrival(traces, 0).data))
    incoming = [arrival(traces, n) for n in range(300)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # otherwise threads rarely meet
    try:
        with (
            Replay.open(path, limits=limits, expected=traces.expected, cache_bytes=0) as replay,
            ThreadPoolExecutor(2) as threads,
        ):
            shards = [
                threads.submit(lambda part: [replay.admit([one]) for one in part], incoming[n::2]) for n in (0, 1)
            ]
            while not all(shard.done() for shard in shards):
                assert replay.num_file_bytes < 2 * limits.total_bytes
            assert sum(len(shard.result()) for shard in shards) == 300
            assert replay.num_file_bytes == sum(map(size, segments(path)))
    finally:
        sys.setswitchinterval(interval)


def test_on_a_full_disk_nothing_is_admitted_and_all_is_once_there_is_room(path: Path, traces: TraceMaker) -> None:
    batch = [arrival(traces, seed) for seed in range(30)]
    with opened(path, traces) as replay:
        replay.admit(batch[:1])
        with file_size_limit(100_000), pytest.raises(Exhausted, match="free disk space"):
            replay.admit(batch)
        assert replay.training_ids() == [batch[0].sample.trace_id]
        assert len(replay.admit(batch)) == 29


def test_traces_that_cannot_be_read_for_a_while_are_left_out_and_come_back(path: Path, traces: TraceMaker) -> None:
    with opened(path, traces, cache_bytes=0) as replay:
        replay.admit([arrival(traces, seed) for seed in range(3)])
        with no_file_opens():
            assert draw(replay, Counter()) == []
        assert len(draw(replay, Counter())) == 3
        assert replay.take_damaged() == 0


def test_an_index_that_cannot_be_read_for_a_while_costs_no_trace(path: Path, traces: TraceMaker) -> None:
    first, second = ([arrival(traces, seed) for seed in seeds] for seeds in (range(2), range(2, 5)))
    with opened(path, traces) as replay:
        replay.admit(first)
        with closing(sqlite3.connect(path / INDEX)) as db:
            db.execute("ALTER TABLE samples RENAME TO hidden")
            for _ in range(2):
                with pytest.raises(Exhausted, match="cannot be written"):
                    replay.admit(second)
            assert len(draw(replay, Counter())) == 2
            db.execute("ALTER TABLE hidden RENAME TO samples")
        assert len(replay.admit(second)) == 3
        assert len(draw(replay, Counter(), count=10)) == replay.num_samples(Pool.WINDOW) == 5


def test_a_trace_is_admitted_only_into_a_file_whose_name_is_durable(
    path: Path, traces: TraceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(path, traces) as replay:
        with monkeypatch.context() as patch:
            patch.setattr(segments_module, "sync", broken)
            num_files = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(2):
                with pytest.raises(Exhausted):
                    replay.admit([arrival(traces, 1)])
            assert len(list(Path("/proc/self/fd").iterdir())) == num_files
        assert len(replay.admit([arrival(traces, 1)])) == 1
        assert len(draw(replay, Counter())) == 1


def test_an_index_of_an_earlier_layout_is_told(path: Path, traces: TraceMaker) -> None:
    path.mkdir(parents=True)
    with closing(sqlite3.connect(path / INDEX)) as earlier, earlier:
        earlier.execute("CREATE TABLE samples (trace_id TEXT PRIMARY KEY, admitted INTEGER NOT NULL)")
    with pytest.raises(Corrupt, match="of an earlier Updraft; move it away"), opened(path, traces):
        pass


def test_as_many_samples_are_fitted_as_are_needed_however_many_judge_and_whatever_memory_they_take(
    path: Path, traces: TraceMaker
) -> None:
    with opened(path, traces) as replay:  # no memory for more
        replay.admit([arrival(traces, seed) for seed in range(13)])
        fitted, judges = replay.closed_form_batch(count=100, min_count=8, num_held_out=5)
    assert len(fitted) == 8
    assert len(judges) == 5

"""What replay deletes on purpose: the samples of forgotten tenants, and those that are too old, also from the disk."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.support.disk import file_size_limit
from tests.support.traces import TraceMaker

from updraft_chassis.errors import Exhausted
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import Pool, ReplayLimits
from updraft_trainer.data.sample import read_sample

ACME, RIVAL = "ffffffffffffffff", "0000000000000007"
HASHES = {ACME: 2**64 - 1, RIVAL: 7, "": 0}
NOW_MS = 1_700_000_000_000
LATE_MS = NOW_MS + 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "replay"


def opened(path: Path, traces: TraceMaker, max_bytes: int = 10 * 1024**2) -> AbstractContextManager[Replay]:
    return Replay.open(path, limits=ReplayLimits.of(max_bytes), expected=traces.expected, cache_bytes=1024**2)


def arrival(
    traces: TraceMaker,
    seed: int,
    tenant: str = "",
    *,
    finished_ms: int = NOW_MS,
    evaluation: bool = False,
    retention_s: int = 0,
) -> IncomingTrace:
    data = traces.data(
        seed, tenant=HASHES[tenant], finished_ms=finished_ms, evaluation=evaluation, retention_s=retention_s
    )
    return IncomingTrace(sample=read_sample(data, traces.expected), data=data)


def stored_bytes(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(path.glob("*.segment")))


def test_a_forgotten_tenant_is_gone_from_every_pool_and_from_the_disk(path: Path, traces: TraceMaker) -> None:
    acme = [arrival(traces, seed, ACME, evaluation=seed % 2 == 0) for seed in range(6)]
    others = [arrival(traces, seed, tenant) for seed, tenant in ((10, RIVAL), (11, ""))]
    with opened(path, traces) as replay:
        replay.admit([*acme, *others])

        assert replay.forget({ACME: NOW_MS}) == 6

        assert sorted(replay.training_ids()) == sorted(trace.sample.trace_id for trace in others)
        assert replay.num_samples(Pool.EVALUATION) == 0
        assert replay.tenants(replay.training_ids()) == {RIVAL}
        assert not any(trace.data in stored_bytes(path) for trace in acme)
        assert all(trace.data in stored_bytes(path) for trace in others)
        assert replay.forget({ACME: NOW_MS}) == 0, "it is idempotent"


def test_late_arrivals_from_before_the_order_are_refused_also_after_a_restart(path: Path, traces: TraceMaker) -> None:
    before, after = arrival(traces, 1, ACME), arrival(traces, 2, ACME, finished_ms=LATE_MS)
    with opened(path, traces) as replay:
        replay.forget({ACME: NOW_MS})
        assert replay.admit([before, after]) == [after.sample]
    with opened(path, traces) as replay:
        assert replay.is_forgotten(before.sample)
        assert replay.admit([before]) == []
        assert replay.forget({ACME: LATE_MS}) == 1
        assert replay.forget({ACME: NOW_MS}) == 0, "an older order changes nothing"
        assert replay.is_forgotten(after.sample)


def test_what_was_dropped_before_is_erased_from_the_disk_too(path: Path, traces: TraceMaker) -> None:
    """Space of dropped traces is otherwise reclaimed when there is enough of it."""
    size = len(arrival(traces, 0).data)
    acme = [arrival(traces, seed, ACME, evaluation=True) for seed in range(8)]
    with opened(path, traces, max_bytes=40 * size) as replay:  # a tenth of it for held-out ones
        replay.admit(acme)
        assert replay.num_samples(Pool.EVALUATION) < 5

        replay.forget({ACME: NOW_MS})

        assert not any(trace.data in stored_bytes(path) for trace in acme)


def test_a_deletion_that_the_disk_interrupts_is_finished_by_the_next_start(path: Path, traces: TraceMaker) -> None:
    acme, rival = arrival(traces, 1, ACME), arrival(traces, 2, RIVAL)
    with opened(path, traces) as replay:
        replay.admit([acme, rival])
        with file_size_limit(0), pytest.raises(Exhausted):
            replay.forget({ACME: NOW_MS})
    with opened(path, traces) as replay:
        replay.forget({ACME: NOW_MS})
        assert replay.training_ids() == [rival.sample.trace_id]
        assert acme.data not in stored_bytes(path)
        assert rival.data in stored_bytes(path)


def test_samples_beyond_the_age_limit_are_gone_from_every_pool_and_from_the_disk(
    path: Path, traces: TraceMaker
) -> None:
    old = [arrival(traces, seed, evaluation=seed % 2 == 0) for seed in range(4)]
    new = arrival(traces, 9, finished_ms=LATE_MS)
    with opened(path, traces) as replay:
        replay.admit([*old, new])

        assert replay.expire(LATE_MS, before_ms=NOW_MS) == 0
        assert replay.expire(LATE_MS, before_ms=LATE_MS) == 4

        assert replay.training_ids() == [new.sample.trace_id]
        assert replay.num_samples(Pool.EVALUATION) == 0
        assert not any(trace.data in stored_bytes(path) for trace in old)
        assert replay.admit([old[0]]) == [], "it is still known"


def test_it_is_not_done_while_a_file_cannot_be_read_or_deleted(path: Path, traces: TraceMaker) -> None:
    acme, rival = arrival(traces, 1, ACME), arrival(traces, 2, RIVAL)
    with opened(path, traces) as replay:
        replay.admit([acme, rival])
        (file,) = path.glob("*.segment")
        kept = file.rename(path / "elsewhere")
        file.mkdir()  # neither can be read nor unlinked, also by root
        with pytest.raises(Exhausted, match="cannot be read or deleted"):
            replay.forget({ACME: NOW_MS})
        assert replay.training_ids() == [rival.sample.trace_id], "it is forgotten all the same"
        with pytest.raises(Exhausted):
            replay.forget({ACME: NOW_MS})
        file.rmdir()
        kept.rename(file)

        replay.forget({ACME: NOW_MS})

        assert acme.data not in stored_bytes(path)
        assert rival.data in stored_bytes(path)


def test_a_damaged_trace_of_another_tenant_keeps_no_file(path: Path, traces: TraceMaker) -> None:
    acme, rival = arrival(traces, 1, ACME), arrival(traces, 2, RIVAL)
    with opened(path, traces) as replay:
        replay.admit([acme, rival])
        (file,) = path.glob("*.segment")
        file.write_bytes(bytes(acme.data) + bytes(len(rival.data)))

        replay.forget({ACME: NOW_MS})

        assert replay.training_ids() == []
        assert acme.data not in stored_bytes(path)


def test_files_without_traces_of_the_tenant_are_not_rewritten(path: Path, traces: TraceMaker) -> None:
    size = len(arrival(traces, 0).data)
    with opened(path, traces, max_bytes=40 * size) as replay:
        replay.admit([arrival(traces, seed, RIVAL, evaluation=True) for seed in range(8)])
        before = {file.name: file.stat().st_mtime_ns for file in path.glob("*.segment")}

        assert replay.forget({ACME: NOW_MS}) == 0

        assert {file.name: file.stat().st_mtime_ns for file in path.glob("*.segment")} == before


def test_what_an_interrupted_admission_has_left_is_erased_by_any_order(path: Path, traces: TraceMaker) -> None:
    acme, rival = arrival(traces, 1, ACME), arrival(traces, 2, RIVAL)
    with opened(path, traces) as replay:
        replay.admit([rival])
    (file,) = path.glob("*.segment")
    with file.open("ab") as torn:
        torn.write(acme.data)
    with opened(path, traces) as replay:
        replay.forget({ACME: NOW_MS})

        assert acme.data not in stored_bytes(path)
        assert replay.training_ids() == [rival.sample.trace_id]


def test_traces_are_admitted_while_files_are_rewritten(path: Path, traces: TraceMaker) -> None:
    """Each file in a turn of its own: an admission waits for one file and not for all."""
    size = len(arrival(traces, 0).data)
    arrivals = [arrival(traces, seed, (ACME, RIVAL)[seed % 2]) for seed in range(60)]
    with opened(path, traces, max_bytes=160 * size) as replay:
        for first in range(0, 60, 10):
            replay.admit(arrivals[first : first + 10])
        assert len(list(path.glob("*.segment"))) > 4
        with ThreadPoolExecutor() as threads:
            erasing = threads.submit(replay.forget, {ACME: NOW_MS})
            new = [arrival(traces, seed, RIVAL) for seed in range(100, 120)]
            admitted = [replay.admit([one]) for one in new]
            assert erasing.result() == 30

        assert all(len(one) == 1 for one in admitted)
        data = stored_bytes(path)
        assert not any(one.data in data for one in arrivals[::2])
        assert all(one.data in data for one in (*arrivals[1::2], *new))


def test_it_is_remembered_for_which_orders_a_stream_was_searched(path: Path, traces: TraceMaker) -> None:
    with opened(path, traces) as replay:
        assert replay.searched_ms("a") == 0
        replay.set_searched("a", 5)
        replay.set_searched("a", 7)
    with opened(path, traces) as replay:
        assert (replay.searched_ms("a"), replay.searched_ms("b")) == (7, 0)


def test_samples_go_at_the_age_that_their_tenant_allows_also_after_a_restart(path: Path, traces: TraceMaker) -> None:
    short = [arrival(traces, seed, ACME, evaluation=seed % 2 == 0, retention_s=1) for seed in range(4)]
    others = [arrival(traces, 8, RIVAL, retention_s=60), arrival(traces, 9)]
    with opened(path, traces) as replay:
        replay.admit([*short, *others])
        assert replay.expire(LATE_MS - 1) == 0
    with opened(path, traces) as replay:
        assert replay.has_expiring
        assert replay.expire(LATE_MS) == 4

        assert set(replay.training_ids()) == {trace.sample.trace_id for trace in others}
        assert replay.num_samples(Pool.EVALUATION) == 0
        assert not any(trace.data in stored_bytes(path) for trace in short)
        assert replay.expire(LATE_MS, before_ms=LATE_MS) == 2, "the shorter age holds"
        assert not replay.has_expiring

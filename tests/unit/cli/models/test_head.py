"""A model's head goes on from any byte, survives a full disk, and is fetched again when the model changes."""

import errno
import fcntl
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.disk import age, file_size_limit, no_cleanup
from tests.support.published_targets import make

from updraft_artifacts.model_folder import target_fingerprint
from updraft_chassis.errors import Corrupt, Exhausted, Unavailable
from updraft_cli.models import head, pulling
from updraft_cli.models.head import HeadSource, _Plan
from updraft_cli.models.pulling import pull
from updraft_cli.models.source import Address, File, Listing, address, taken
from updraft_draft.target_weights import read_head

HEAD = replace(address("hf://org/name"), is_head_only=True)


class FolderSource:
    """A folder, as a source of files and ranges; `num_ranges` large ones are sent, if it is set, and then none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.num_ranges: int | None = None
        self.num_bytes = 0
        self.meets: Barrier | None = None
        self.is_truncated = False

    def opened(self, _: Address) -> HeadSource:
        return HeadSource(self, "hf://org/name")

    def listing(self, revision: str) -> Listing:
        files = [
            File(name=path.name, size_bytes=path.stat().st_size, tag=str(path.stat().st_mtime_ns))
            for path in self._folder.iterdir()
        ]
        return Listing(revision=revision, files=taken("a folder", files))

    def arrived_bytes(self, folder: Path) -> int:
        return 0

    def fetch(
        self,
        _: Listing,
        files: Iterable[File],
        folder: Path,
        done: Callable[[File], None],
        *,
        is_alone: bool = True,
    ) -> None:
        for file in files:
            shutil.copy(self._folder / file.name, folder / file.name)
            done(file)

    def read(self, _: Listing, file: File, begin: int, end: int) -> bytes:
        if begin and end - begin == head._RANGE_BYTES:
            if self.num_ranges is not None:
                self.num_ranges -= 1
                if self.num_ranges < 0:
                    raise Unavailable("the connection was lost")
            if self.meets is not None:
                self.meets.wait(timeout=30)
        self.num_bytes += end - begin
        end -= 1 if self.is_truncated and begin else 0
        return (self._folder / file.name).read_bytes()[begin:end]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderSource:
    make("GLM 4.5", tmp_path / "source")
    monkeypatch.setattr(head, "_RANGE_BYTES", 9_000)  # the tensors are 164 kB
    monkeypatch.setattr(head, "_PARALLEL_RANGES", 2)
    return FolderSource(tmp_path / "source")


@given(
    header=st.binary(min_size=1, max_size=20),
    ends=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=3),
    arrived=st.integers(0, 200),
)
def test_what_has_arrived_and_what_is_missing_make_the_file(
    header: bytes, ends: list[tuple[int, int]], arrived: int
) -> None:
    content = bytes(range(101))
    ranges = tuple(("file", min(pair), max(pair)) for pair in ends)
    plan = _Plan(fingerprint="", header=header, ranges=ranges)
    whole = header + b"".join(content[begin:end] for _, begin, end in ranges)
    arrived = max(len(header), min(arrived, len(whole)))
    missing = b"".join(content[begin:end] for _, begin, end in plan.after(arrived))
    assert whole[:arrived] + missing == whole
    assert plan.size_bytes == len(whole)


def test_a_lost_connection_costs_no_range_that_arrived(source: FolderSource, tmp_path: Path) -> None:
    source.num_ranges = 9
    with pytest.raises(Unavailable):
        pull(HEAD, tmp_path / "one", opened=source.opened)
    (part,) = (tmp_path / "one" / ".updraft").glob("head-*.part")
    arrived = part.stat().st_size
    assert arrived > 5 * 9_000
    source.num_ranges = None
    source.num_bytes = 0
    source.opened(HEAD).listing("")
    described, source.num_bytes = source.num_bytes, 0
    assert pull(HEAD, tmp_path / "one", opened=source.opened).is_whole
    assert source.num_bytes - described <= 164_500 - arrived
    assert read_head(tmp_path / "one").head.equal(read_head(tmp_path / "source").head)


def test_a_full_disk_is_one_sentence_and_what_fitted_is_kept(source: FolderSource, tmp_path: Path) -> None:
    with file_size_limit(60_000), pytest.raises(Exhausted, match=r"the disk of .* is full: free some space and pull"):
        pull(HEAD, tmp_path / "one", opened=source.opened)
    (part,) = (tmp_path / "one" / ".updraft").glob("head-*.part")
    assert 50_000 < part.stat().st_size <= 60_000
    pull(HEAD, tmp_path / "one", opened=source.opened)
    assert read_head(tmp_path / "one").head.equal(read_head(tmp_path / "source").head)
    assert target_fingerprint(tmp_path / "one") == target_fingerprint(tmp_path / "source")


def test_what_was_fetched_of_another_model_is_not_continued(source: FolderSource, tmp_path: Path) -> None:
    source.num_ranges = 5
    with pytest.raises(Unavailable):
        pull(HEAD, tmp_path / "one", opened=source.opened)
    source.num_ranges = None
    make("GLM 4.5", tmp_path / "source", seed=1)
    pull(HEAD, tmp_path / "one", opened=source.opened)
    assert read_head(tmp_path / "one").head.equal(read_head(tmp_path / "source").head)
    assert not list((tmp_path / "one" / ".updraft").glob("head-*.part"))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)


def killed(source: FolderSource, folder: Path) -> Path:
    """What a pull leaves that is killed."""
    before = set((folder / ".updraft").glob("head-*.part"))
    source.num_ranges = 5
    with no_cleanup(), pytest.raises(Unavailable):
        pull(HEAD, folder, opened=source.opened)
    source.num_ranges = None
    (part,) = set((folder / ".updraft").glob("head-*.part")) - before
    return part


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_pull_removes_what_killed_ones_left_and_not_what_is_being_written(
    source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (killed(source, tmp_path / "one") for _ in range(2))
    age(old, hours=1.1)
    there: list[bool] = []
    monkeypatch.setattr(pulling, "_check_room", lambda *_: there.append(old.exists()))
    assert pull(HEAD, tmp_path / "one", opened=source.opened).is_whole
    assert there == [False], "before room is needed"
    assert new.exists()
    age(new, hours=1.1)
    assert pull(HEAD, tmp_path / "one", opened=source.opened).is_whole
    assert not new.exists(), "also if nothing is left to download"


def test_with_locks_a_pull_goes_on_with_what_was_left_long_ago(source: FolderSource, tmp_path: Path) -> None:
    source.num_ranges = 9
    with pytest.raises(Unavailable):
        pull(HEAD, tmp_path / "one", opened=source.opened)
    (part,) = (tmp_path / "one" / ".updraft").glob("head-*.part")
    age(part, hours=100)
    source.num_ranges = 13  # fewer than a whole head has
    assert pull(HEAD, tmp_path / "one", opened=source.opened).is_whole


@pytest.mark.usefixtures("no_locks")
def test_two_pulls_without_locks_do_not_write_into_one_file(
    source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_PARALLEL_RANGES", 1)
    source.meets = Barrier(2)  # each range of the one is read while the other reads the same
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(pull, HEAD, tmp_path / "one", opened=source.opened) for _ in range(2)]
        assert all(one.result().is_whole for one in running)
    ours, theirs = read_head(tmp_path / "one"), read_head(tmp_path / "source")
    assert ours.head.equal(theirs.head)
    assert ours.embedding.equal(theirs.embedding)
    assert not list((tmp_path / "one" / ".updraft").glob("*.part"))


def test_weights_of_another_size_than_planned_are_removed_and_refused(source: FolderSource, tmp_path: Path) -> None:
    source.num_ranges = 5
    with pytest.raises(Unavailable):
        pull(HEAD, tmp_path / "one", opened=source.opened)
    (part,) = (tmp_path / "one" / ".updraft").glob("head-*.part")
    part.write_bytes(bytes(200_000))
    source.num_ranges = None
    with pytest.raises(Corrupt, match=r"model.safetensors would have 200,000 bytes instead of 164,\d+: pull again"):
        pull(HEAD, tmp_path / "one", opened=source.opened)
    assert not (tmp_path / "one" / "model.safetensors").exists()
    assert pull(HEAD, tmp_path / "one", opened=source.opened).is_whole
    assert read_head(tmp_path / "one").head.equal(read_head(tmp_path / "source").head)


def test_a_source_that_sends_too_few_bytes_is_refused(source: FolderSource, tmp_path: Path) -> None:
    source.is_truncated = True
    with pytest.raises(Corrupt, match=r"of hf://org/name is truncated: \d+ bytes arrived of"):
        pull(HEAD, tmp_path / "one", opened=source.opened)


def test_only_the_part_that_goes_on_counts_as_arrived(source: FolderSource, tmp_path: Path) -> None:
    source.num_ranges = 5
    with pytest.raises(Unavailable):
        pull(HEAD, tmp_path / "one", opened=source.opened)
    (part,) = (tmp_path / "one" / ".updraft").glob("head-*.part")
    (part.parent / "head-0123.part").write_bytes(bytes(1000))  # of another model
    again = source.opened(HEAD)
    again.listing("")
    assert again.arrived_bytes(tmp_path / "one") == part.stat().st_size > 0

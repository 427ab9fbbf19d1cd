"""A folder of recorded requests: a file is whole, or it counts as missing."""

from pathlib import Path

import pytest
from tests.support.disk import age, file_size_limit, no_cleanup

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import Conflict, Exhausted, InvalidInput
from updraft_draft import recordings

TARGET = "sha256:target"


def trace() -> trace_pb2.Trace:
    header = trace_pb2.Header(target_fingerprint=TARGET, request_id="a")
    return trace_pb2.Trace(header=header, prompt_ids=[1, 2], output_ids=range(1000))


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    recordings.write(tmp_path / "new", "3", trace())
    data = recordings.read(tmp_path / "new", "3", target_fingerprint=TARGET)
    assert data == trace().SerializeToString()
    assert recordings.read(tmp_path / "new", "2", target_fingerprint=TARGET) is None


@pytest.mark.parametrize("size", [0, 20, 32, 100])
def test_a_recording_that_was_cut_off_counts_as_missing(tmp_path: Path, size: int) -> None:
    recordings.write(tmp_path, "0", trace())
    place = recordings.path(tmp_path, "0")
    place.write_bytes(place.read_bytes()[:size])
    assert recordings.read(tmp_path, "0", target_fingerprint=TARGET) is None


def test_a_recording_with_a_changed_byte_counts_as_missing(tmp_path: Path) -> None:
    recordings.write(tmp_path, "0", trace())
    place = recordings.path(tmp_path, "0")
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    assert recordings.read(tmp_path, "0", target_fingerprint=TARGET) is None


def test_recordings_of_another_model_are_refused(tmp_path: Path) -> None:
    recordings.write(tmp_path, "0", trace())
    with pytest.raises(Conflict, match="holds recordings of another model: name another folder"):
        recordings.read(tmp_path, "0", target_fingerprint="sha256:other")


def test_a_folder_of_another_model_is_refused_before_anything_is_added_to_it(tmp_path: Path) -> None:
    recordings.write(tmp_path, "a", trace())
    recordings.path(tmp_path, "b").write_bytes(b"damaged")
    recordings.prepare(tmp_path, target_fingerprint=TARGET)
    with pytest.raises(Conflict, match="holds recordings of another model"):
        recordings.prepare(tmp_path, target_fingerprint="sha256:other")


def test_names_are_those_of_recordings_only(tmp_path: Path) -> None:
    assert list(recordings.names(tmp_path / "none")) == []
    for name in ("b", "a"):
        recordings.write(tmp_path, name, trace())
    (tmp_path / "c.trace-1.part").touch()
    (tmp_path / "film").touch()
    assert sorted(recordings.names(tmp_path)) == ["a", "b"]


def test_a_full_disk_is_one_sentence_and_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    recordings.write(tmp_path, "0", trace())
    with file_size_limit(100), pytest.raises(Exhausted, match=r"is full: free some space; the same command goes on"):
        recordings.write(tmp_path, "1", trace())
    assert recordings.read(tmp_path, "0", target_fingerprint=TARGET) is not None
    assert recordings.read(tmp_path, "1", target_fingerprint=TARGET) is None
    assert [path.name for path in tmp_path.iterdir()] == ["0.trace"], "nothing half-written stays"


def test_two_runs_do_not_write_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Path] = []
    replace = Path.replace

    def watched(part: Path, place: Path) -> Path:
        parts.append(part)
        return replace(part, place)

    monkeypatch.setattr(Path, "replace", watched)
    for _ in range(2):
        recordings.write(tmp_path, "0", trace())
    assert parts[0] != parts[1]
    assert [path.name for path in tmp_path.iterdir()] == ["0.trace"]


def test_what_a_killed_run_was_writing_is_removed_an_hour_later(tmp_path: Path) -> None:
    recordings.write(tmp_path, "0", trace())
    with no_cleanup(), file_size_limit(100), pytest.raises(Exhausted):
        recordings.write(tmp_path, "1", trace())
    (tmp_path / "film.part").touch()  # not ours
    for hours, names in ((0.9, 3), (1.1, 2)):
        for path in tmp_path.iterdir():
            age(path, hours=hours)
        recordings.prepare(tmp_path, target_fingerprint=TARGET)
        assert len(list(tmp_path.iterdir())) == names
    assert {path.name for path in tmp_path.iterdir()} == {"0.trace", "film.part"}


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInput, match=r"cannot write recordings to .*file/folder: Not a directory"):
        recordings.write(tmp_path / "file" / "folder", "0", trace())

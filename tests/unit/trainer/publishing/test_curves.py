"""Curves for TensorBoard: files that its readers accept, of bounded size, on disks that fail.

TensorBoard 2.21 itself, tried by hand, read such files and dropped the points that a resumed run repeats.
"""

import logging
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tests.support.clock import ManualClock
from tests.support.disk import file_size_limit

from updraft_trainer.publishing import curves as module
from updraft_trainer.publishing.curves import Curves
from updraft_trainer.publishing.event_file import head, row


@dataclass
class Point:
    step: int
    wall_s: float
    version: str
    is_start: bool
    scalars: dict[str, float]


def _events(data: bytes) -> Iterator[Point]:
    """Each record, whose checksums are checked."""
    while data:
        length, length_crc = struct.unpack("<QI", data[:12])
        content, (crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert (length_crc, crc) == (masked_crc32c(data[:8]), masked_crc32c(content))
        event = Event.FromString(content)
        yield Point(
            step=event.step,
            wall_s=event.wall_time,
            version=event.file_version,
            is_start=event.session_log.status == SessionLog.START,
            scalars={value.tag: value.simple_value for value in event.summary.value},
        )
        data = data[16 + length :]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*tfevents*"))


def _all(folder: Path) -> list[Point]:
    return [event for file in _files(folder) for event in _events(file.read_bytes())]


def _run(folder: Path, clock: ManualClock, steps: range) -> Curves:
    curves = Curves(folder, clock)
    for step in steps:
        curves.add({"train/loss": 1.0 / step})
        assert curves.write(step)
        clock.advance(module.EVERY_S)
    return curves


def test_a_row_holds_the_scalars_of_a_step_whatever_they_are() -> None:
    values = {"train/loss": 0.5, "höhe": -2.0, "huge": 1e300, "nothing": math.nan}
    (event,) = _events(row(1_700_000_000.25, 123_456_789, values))
    assert (event.step, event.wall_s) == (123_456_789, 1_700_000_000.25)
    assert math.isnan(event.scalars.pop("nothing"))
    assert event.scalars == {"train/loss": 0.5, "höhe": -2.0, "huge": math.inf}


def test_the_first_file_of_a_process_takes_over_from_later_points_of_the_one_before(tmp_path: Path) -> None:
    clock = ManualClock()
    _run(tmp_path, clock, range(1, 6))
    _run(tmp_path, clock, range(4, 8))  # killed after step 5, resumed from a state of step 3
    events = _all(tmp_path)
    assert [event.step for event in events if event.scalars] == [1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert [event.step for event in events if event.is_start] == [1, 4]
    assert [event.version for event in events if event.version] == ["brain.Event:2"] * 2
    assert len(_files(tmp_path)) == 2


def test_a_clock_that_was_set_back_does_not_put_new_points_before_old_ones(tmp_path: Path) -> None:
    clock = ManualClock()
    _run(tmp_path, clock, range(1, 4))
    clock.unix_s -= 3600.0
    _run(tmp_path, clock, range(4, 6))
    assert [event.step for event in _all(tmp_path) if event.scalars] == [1, 2, 3, 4, 5]


def test_values_of_an_estimate_are_in_the_next_point_only(tmp_path: Path) -> None:
    clock = ManualClock()
    curves = Curves(tmp_path, clock)
    curves.add({"acceptance_length/candidate": 2.5})
    curves.add({"train/loss": 1.0})
    curves.write(1)
    is_due_at_once = curves.is_due
    clock.advance(module.EVERY_S)
    assert (is_due_at_once, curves.is_due) == (False, True)
    curves.add({"train/loss": 0.5})
    curves.write(2)
    points = [event.scalars for event in _all(tmp_path) if event.scalars]
    assert points == [{"acceptance_length/candidate": 2.5, "train/loss": 1.0}, {"train/loss": 0.5}]


def test_files_are_bounded_and_the_oldest_is_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 1000)
    monkeypatch.setattr(module, "MAX_BYTES", 5000)
    (tmp_path / "events.out.tfevents.0000000000000.somebody-else").write_bytes(bytes(10_000))
    clock = ManualClock()
    _run(tmp_path, clock, range(1, 500))
    ours = sorted(tmp_path.glob("*.updraft"))
    assert sum(file.stat().st_size for file in ours) <= 5000 + len(row(0.0, 1, {"train/loss": 1.0}))
    steps = [event.step for file in ours for event in _events(file.read_bytes()) if event.scalars]
    assert steps == list(range(steps[0], 500)), "the newest are kept"
    assert (tmp_path / "events.out.tfevents.0000000000000.somebody-else").exists()


def test_many_starts_leave_a_bounded_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 5)
    clock = ManualClock()
    for start in range(1, 20):
        _run(tmp_path, clock, range(start, start + 1))
    assert len(_files(tmp_path)) == 5
    assert [event.step for event in _all(tmp_path) if event.scalars] == [15, 16, 17, 18, 19]


def test_a_full_disk_costs_points_and_leaves_whole_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    curves = _run(tmp_path, clock, range(1, 4))
    (file,) = _files(tmp_path)
    with caplog.at_level(logging.WARNING), file_size_limit(file.stat().st_size + 10):
        for step in (4, 5):
            curves.add({"train/loss": 1.0})
            assert not curves.write(step)
    assert len(caplog.records) == 1, "once, not at every point"
    assert "Cannot write curves for TensorBoard, training goes on" in caplog.text
    curves.add({"train/loss": 1.0})
    assert curves.write(6)
    assert [event.step for event in _all(tmp_path) if event.scalars] == [1, 2, 3, 6]


def test_a_disk_that_is_full_at_the_start_collects_no_empty_files(tmp_path: Path) -> None:
    clock = ManualClock()
    curves = Curves(tmp_path, clock)
    with file_size_limit(4):
        for step in range(1, 4):
            assert not curves.write(step)
            clock.advance(module.EVERY_S)
    assert _files(tmp_path) == []
    curves.add({"train/loss": 1.0})
    assert curves.write(4)
    assert [event.step for event in _all(tmp_path) if event.is_start] == [4]


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    clock = ManualClock()
    curves = _run(tmp_path / "runs", clock, range(1, 3))
    for file in _files(tmp_path / "runs"):
        file.unlink()
    (tmp_path / "runs").rmdir()
    curves.add({"train/loss": 1.0})
    assert curves.write(3)
    assert [event.step for event in _all(tmp_path / "runs") if event.scalars] == [3]


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    curves = Curves(tmp_path / "file" / "runs", ManualClock())
    assert not curves.write(1)


def test_a_file_that_goes_on_within_a_process_purges_nothing() -> None:
    (version,) = _events(head(1.0))
    assert (version.version, version.is_start) == ("brain.Event:2", False)

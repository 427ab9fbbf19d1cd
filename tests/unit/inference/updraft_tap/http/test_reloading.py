from pathlib import Path

import pytest
from tests.support.clock import ManualClock
from tests.support.disk import no_file_opens

from updraft_tap.http.reloading import RETRY_S, ReloadingFiles


def test_a_file_that_could_not_be_read_is_tried_again_without_another_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys", ManualClock()
    file.write_text("first")
    keys = ReloadingFiles([file], file.read_text, what="keys", monotonic=clock.monotonic)
    file.write_text("second one")
    with no_file_opens():
        assert [keys.get() for _ in range(3)] == ["first"] * 3
        clock.advance(RETRY_S)
        assert keys.get() == "first"
    assert len(caplog.records) == 1, "the same reason is told once"

    assert keys.get() == "first", "not before its time, because this is asked for each request"
    clock.advance(RETRY_S)
    assert keys.get() == "second one"


def test_a_file_that_is_not_valid_is_read_at_once_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")
    number = ReloadingFiles([file], lambda: int(file.read_text()), what="number", monotonic=ManualClock().monotonic)
    for text, expected in (("none", 1), ("still none", 1), ("22", 22), ("no number", 22), ("333", 333)):
        file.write_text(text)
        assert number.get() == expected

from pathlib import Path

import pytest
from tests.support.clock import ManualClock
from tests.support.disk import no_file_opens

from updraft_chassis import credentials
from updraft_chassis.credentials import ReloadingFile
from updraft_chassis.errors import InvalidInput


def test_a_file_that_could_not_be_read_is_tried_again_without_another_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "token", ManualClock()
    file.write_text("first")
    token = ReloadingFile([file], lambda: credentials.read_text(file, "token"), what="token", clock=clock)
    file.write_text("second one")
    with no_file_opens():
        assert [token.get() for _ in range(3)] == ["first"] * 3
        clock.advance(credentials.RETRY_S)
        assert token.get() == "first"
    assert len(caplog.records) == 1, "the same reason is told once"

    assert token.get() == "first", "not before its time, because this is asked for each call"
    clock.advance(credentials.RETRY_S)
    assert token.get() == "second one"


def test_a_file_that_is_not_valid_is_read_at_once_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")

    def read() -> int:
        text = file.read_text()
        if not text.isdigit():
            raise InvalidInput(f"{text} is no number")
        return int(text)

    number = ReloadingFile([file], read, what="number", clock=ManualClock())
    for text, expected in (("none", 1), ("still none", 1), ("22", 22), ("no number", 22), ("333", 333)):
        file.write_text(text)
        assert number.get() == expected

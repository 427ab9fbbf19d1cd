import pytest

from updraft_chassis.progress import Progress


def test_each_change_is_a_line_that_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [Progress(activity="recording", done=n, total=3, tokens=10 * n) for n in range(3)]
    for change in changes:
        change.write()
    assert [Progress.parse(line) for line in capsys.readouterr().out.splitlines()] == changes

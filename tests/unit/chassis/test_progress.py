import subprocess
import sys

import pytest

from updraft_chassis import progress
from updraft_chassis.progress import Progress

TALKATIVE = """
import os
from updraft_chassis import progress
with progress.on_stdout() as report:
    print("from Python")
    os.write(1, b"from C\\n")
    report(progress.Progress(activity="recording", done=0, total=1))
print("afterwards")
"""


def test_each_change_is_a_line_that_can_be_read_back(capfd: pytest.CaptureFixture[str]) -> None:
    changes = [Progress(activity="recording", done=n, total=3, tokens=10 * n) for n in range(3)]
    with progress.on_stdout() as report:
        for change in changes:
            report(change)
    assert [Progress.parse(line) for line in capfd.readouterr().out.splitlines()] == changes


def test_what_a_library_prints_does_not_come_between_the_lines() -> None:
    done = subprocess.run([sys.executable, "-c", TALKATIVE], capture_output=True, text=True, check=True)
    first, *others = done.stdout.splitlines()
    assert Progress.parse(first) == Progress(activity="recording", done=0, total=1)
    assert others == ["afterwards"]
    assert sorted(done.stderr.splitlines()) == ["from C", "from Python"]

import signal
from pathlib import Path

import pytest

from updraft_cli.local.child import LogFile, ending


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "child.log"
    path.write_text("before\n")
    log = LogFile(path)
    log.write(b"after\n")
    log.close()
    assert path.read_text() == "before\nafter\n"


def test_a_full_file_becomes_the_predecessor(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "child.log", max_bytes=8)
    for line in (b"one\n", b"two\n", b"three\n"):
        log.write(line)
    log.close()
    assert (tmp_path / "child.log").read_text() == "three\n"
    assert (tmp_path / "child.log.1").read_text() == "one\ntwo\n"


def test_lines_that_the_disk_refused_are_counted_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    log = LogFile(folder / "child.log")
    log.write(b"lost\n")
    log.write(b"lost\n")
    folder.mkdir()
    log.write(b"kept\n")
    log.close()
    assert (folder / "child.log").read_text() == "(2 lines are missing here: the disk was full)\nkept\n"


@pytest.mark.parametrize(
    ("returncode", "how"),
    [
        (2, "exited with code 2"),
        (-signal.SIGTERM, "was killed by SIGTERM"),
        (-(signal.SIGRTMIN + 1), f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_an_ending_names_the_code_or_the_signal(returncode: int, how: str) -> None:
    assert ending(returncode) == how

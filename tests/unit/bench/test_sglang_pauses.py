"""The clock that bench-sglang puts into a stock server: SGLang finds it, and what it wrote is read in pairs."""

from importlib import metadata
from pathlib import Path

import pytest
from bench.sglang import pause_clock


def test_sglang_finds_it_by_entry_point_in_a_folder_that_has_its_file(tmp_path: Path) -> None:
    folder = pause_clock.write(tmp_path / "clock")

    (found,) = metadata.distributions(path=[str(folder)])
    (point,) = found.entry_points

    assert (point.group, point.module, point.attr) == ("sglang.srt.plugins", "pause_clock", "register")
    assert (folder / "pause_clock.py").read_text() == Path(pause_clock.__file__).read_text()


def test_each_pause_is_when_it_began_and_when_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "pauses"
    path.write_text("1.5\n2.0\n7.25\n8.0\n")

    assert pause_clock.read(path) == [(1.5, 2.0), (7.25, 8.0)]
    with path.open("a") as file:
        file.write("9.0\n")
    with pytest.raises(ValueError, match="shorter"):
        pause_clock.read(path)

"""Folders of recorded traces."""

from pathlib import Path

import pytest
from tests.support.traces import TraceMaker

from updraft_draft import recordings


@pytest.fixture
def folder(traces: TraceMaker, tmp_path: Path) -> Path:
    """24 recordings, of which some have equal texts."""
    for number in range(24):
        recordings.write(tmp_path / "recordings", f"{number:02}", traces.trace(number))
    return tmp_path / "recordings"

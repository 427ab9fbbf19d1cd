"""kill -9 at every few steps of a publication: the next start finds the old state or the new one, and nothing torn."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.checkpoints import draft
from tests.support.dying_publisher import publish
from tests.support.versions import NOW_MS

from updraft_registry.archive import open_archive
from updraft_registry.version import Phase, Policy

# Every how many steps one run dies: coprime to the loops of the code, and a few dozen processes.
STRIDE = 11

STATES = [
    {1: Phase.STABLE},
    {1: Phase.STABLE, 2: Phase.PENDING},
    {1: Phase.SUPERSEDED, 2: Phase.STABLE},
]


def die(folder: Path, step: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.dying_publisher", str(folder), str(step)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."})


@pytest.fixture(scope="module")
def num_steps(tmp_path_factory: pytest.TempPathFactory) -> int:
    whole = die(tmp_path_factory.mktemp("whole"), 0)
    assert whole.returncode == 0, whole.stderr
    return int(whole.stdout)


def test_a_publication_that_is_killed_at_any_step_leaves_the_old_or_the_new_state(
    tmp_path: Path, num_steps: int
) -> None:
    seen = set()
    for step in range(1, num_steps + 1, STRIDE):
        folder = tmp_path / str(step)
        assert die(folder, step).returncode == -signal.SIGKILL
        seen.add(_check(folder, step))
    assert seen == {0, 1, 2}, "the sweep met every state that there is"


def _check(folder: Path, step: int) -> int:
    """Start again on what is left; returns which of STATES it is."""
    with open_archive(folder, defaults=Policy(), max_draft_bytes=10**6) as opened:
        opened.recover(NOW_MS)
        rows = opened.catalogue.page("default", after=None, size=9)
        phases = {version.number: version.phase for version, _ in rows}
        assert phases in STATES, f"killed at step {step}"
        for version, manifest in rows:
            assert manifest.digest == draft(version.number).digest
            file, _ = opened.open("default", version.number)
            with file:
                assert file.read() == draft(version.number).data, f"killed at step {step}"
        assert list((folder / "uploads").iterdir()) == []
        assert {int(path.stem) for path in (folder / "versions" / "default").iterdir()} == phases.keys()
        publish(opened, 2)
        after = {v.number: v.phase for v, _ in opened.catalogue.page("default", after=None, size=9)}
        assert after == STATES[2], f"killed at step {step}: the sender tries again"
        return STATES.index(phases)

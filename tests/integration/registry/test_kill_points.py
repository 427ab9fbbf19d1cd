"""kill -9 at every few steps of whatever changes something: the next start finds a state that there was, and nothing torn."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.checkpoints import draft
from tests.support.dying import NAME, SCENARIOS, open_in, publish
from tests.support.versions import NOW_MS

from updraft_registry.storage.archive import Archive, open_archive
from updraft_registry.storage.maintenance import CheckResult, fsck
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase, Strategy

# Every how many steps one run dies: prime to the loops of the code, and a few dozen runs.
STRIDE = 17

# What a mere start does not look for; and a repair that is killed is simply run again.
DAMAGING = ("repair", "rewrite")


@dataclass(frozen=True)
class Left:
    """What a start finds: the history, oldest first, and the phase of each version."""

    history: list[str]
    phases: dict[int, Phase]


@pytest.fixture(params=sorted(SCENARIOS))
def died(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    command = [sys.executable, "-m", "tests.support.dying", str(tmp_path), request.param, str(STRIDE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    if request.param in DAMAGING:
        for path in tmp_path.iterdir():
            _fsck(path, is_repairing=True)
    return tmp_path


def test_whatever_is_killed_at_any_step_leaves_a_state_that_there_was(died: Path) -> None:
    before, after = _start(died / "prepared"), _start(died / "whole")
    assert after.history[: len(before.history)] == before.history
    steps = [path for path in died.iterdir() if path.name.isdecimal()]
    assert len(steps) > 10
    lengths = set()
    for folder in steps:
        left = _start(folder)
        assert left.history == after.history[: len(left.history)], f"killed at step {folder.name}"
        assert len(left.history) >= len(before.history), f"killed at step {folder.name}"
        lengths.add(len(left.history))
        outcome = _fsck(folder)
        assert not [finding for finding in outcome.found if finding.is_damage], f"killed at step {folder.name}"
    assert {len(before.history)} <= lengths


@pytest.mark.parametrize("died", ["publication"], indirect=True)
def test_a_publication_that_was_killed_is_sent_again_and_becomes_the_same_version(died: Path) -> None:
    seen = []
    for folder in (path for path in died.iterdir() if path.name.isdecimal()):
        seen.append(_start(folder).phases)
        for opened in _opened(folder):
            publish(opened, 2)
        assert _start(folder).phases == {1: Phase.SUPERSEDED, 2: Phase.STABLE}, f"killed at step {folder.name}"
    for state in ({1: Phase.STABLE}, {1: Phase.STABLE, 2: Phase.PENDING}, {1: Phase.SUPERSEDED, 2: Phase.STABLE}):
        assert state in seen, "the sweep met every state that there is"


def _fsck(folder: Path, *, is_repairing: bool = False) -> CheckResult:
    return fsck(open_in(folder), is_repairing=is_repairing, is_hashing=True, progress=lambda _done, _total: None)


def _opened(folder: Path) -> Iterator[Archive]:
    with open_archive(folder, defaults=RolloutPolicy(strategy=Strategy.IMMEDIATE), max_draft_bytes=10**6) as opened:
        opened.recover(NOW_MS)
        yield opened


def _start(folder: Path) -> Left:
    """Start again on what is left, and look at all of it."""
    for opened in _opened(folder):
        history = list(opened.catalogue.history(NAME, 1000).values())[::-1]
        rows = opened.catalogue.page(NAME, after=None, size=100)
        for version, manifest in rows:
            assert manifest.digest == draft(version.number).digest
            phases = [event.after for event in history if event.number == version.number and event.after is not None]
            assert version.phase is phases[-1], "a phase is what the history came to"
            if version.is_kept:
                with opened.store.open(version.digest) as file:
                    assert file.read() == draft(version.number).data
        assert list((folder / "uploads").iterdir()) == []
        return Left(
            history=[f"{event.number}: {event.reason}" for event in history],
            phases={version.number: version.phase for version, _ in rows},
        )
    raise AssertionError

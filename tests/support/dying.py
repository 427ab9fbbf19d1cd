"""Runs a scenario again and again and dies in it, a step later each time: `python -m tests.support.dying FOLDER NAME STRIDE`.

Steps are those of the registry's own functions (tests.support.reaper). Leaves one folder for each step at which it died,
named by it, and `whole` for the run that came to its end.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.checkpoints import draft, evaluation
from tests.support.clock import ManualClock
from tests.support.reaper import Reaper
from tests.support.versions import NOW_MS, holding

from updraft.registry.v1 import registry_pb2
from updraft_registry.rollout import decision
from updraft_registry.rollout.decision import decide
from updraft_registry.rollout.retention import versions_to_keep
from updraft_registry.settings import RegistrySettings
from updraft_registry.storage import archive, catalogue, documents, fsck, maintenance
from updraft_registry.storage.stores import folder as folder_store
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Strategy

NAME = "default"

_FILES = {module.__file__ for module in (archive, catalogue, documents, fsck, folder_store, maintenance)}


def publish(opened: archive.Archive, seed: int) -> None:
    """Publish, decide, write down: what the process does between an upload and its answer."""
    manifest = draft(seed).manifest(
        source=registry_pb2.SOURCE_INITIAL if seed == 1 else registry_pb2.SOURCE_TRAINER,
        evaluation=evaluation(baseline=seed - 1),
    )
    if opened.admit(manifest) is None:
        upload = opened.begin(manifest)
        upload.write(0, draft(seed).data)
        opened.verify(upload, manifest)
        opened.publish(upload, manifest, NOW_MS)
    settle(opened)


def settle(opened: archive.Archive, *, num_pods: int = 0) -> None:
    """Decide with so many pods that hold the stable version, and write it down."""
    speculator = opened.catalogue.speculator(NAME)
    pods = [holding(f"pod-{i}", speculator.versions[0]) for i in range(num_pods)]
    decision = decide(speculator, pods, NOW_MS)
    if decision.transitions or decision.rollout != speculator.rollout:
        opened.record(NAME, decision.transitions, decision.rollout)


def open_in(folder: Path, strategy: Strategy = Strategy.IMMEDIATE) -> maintenance.Folder:
    """What every scenario works in."""
    config = RegistrySettings(data_dir=folder, strategy=strategy)
    return maintenance.Folder(path=folder, store=folder_store.FolderStore(folder), config=config, clock=ManualClock())


def _publication(folder: Path) -> None:
    with archive.open_archive(folder, defaults=_policy(), max_draft_bytes=10**6) as opened:
        opened.recover(NOW_MS)
        publish(opened, 2)


def _wishes(folder: Path) -> None:
    with archive.open_archive(folder, defaults=_policy(), max_draft_bytes=10**6) as opened:
        opened.set_policy(NAME, registry_pb2.RolloutPolicy(revision_history_limit=3), NOW_MS)
        opened.pin(NAME, 0, "none today", NOW_MS)
        settle(opened)
        opened.pin(NAME, None, "again", NOW_MS)
        settle(opened)
        opened.retain(NAME, 1, is_retained=True, now_ms=NOW_MS)
        opened.pause(NAME, "lunch", is_paused=True, now_ms=NOW_MS)


def _canary(folder: Path) -> None:
    with archive.open_archive(folder, defaults=_policy(Strategy.CANARY), max_draft_bytes=10**6) as opened:
        publish(opened, 2)
        settle(opened, num_pods=4)
        opened.act(decision.promote, NAME, 2, "good enough", NOW_MS)
        settle(opened)
        opened.act(decision.reject, NAME, 2, "it was not", NOW_MS)
        settle(opened)


def _sweep(folder: Path) -> None:
    with archive.open_archive(folder, defaults=_policy(), max_draft_bytes=10**6) as opened:
        publish(opened, 2)
        opened.act(decision.reject, NAME, 2, "slow", NOW_MS)
        speculator = opened.catalogue.speculator(NAME)
        opened.sweep(speculator, versions_to_keep(speculator, ()))


def _rebuild(folder: Path) -> None:
    maintenance.rebuild(open_in(folder))


def _repair(folder: Path) -> None:
    (folder / "uploads" / "left.part").write_bytes(b"half")
    (folder / archive.CATALOGUE).write_bytes((folder / archive.CATALOGUE).read_bytes()[:-4096])
    maintenance.fsck(open_in(folder), is_repairing=True, is_hashing=True, progress=lambda _done, _total: None)


def _rewrite(folder: Path) -> None:
    (folder / "versions" / NAME / "1.json").write_bytes(b"rubbish")
    maintenance.rebuild(open_in(folder))


SCENARIOS: Mapping[str, Callable[[Path], None]] = {
    "publication": _publication,
    "wishes": _wishes,
    "canary": _canary,
    "sweep": _sweep,
    "rebuild": _rebuild,
    "repair": _repair,
    "rewrite": _rewrite,
}


def _policy(strategy: Strategy = Strategy.IMMEDIATE) -> RolloutPolicy:
    return RolloutPolicy(strategy=strategy)


def _die(folder: Path, scenario: Callable[[Path], None], step: int) -> int:
    """Run it in a process of its own; returns the number of steps that it took to the end."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        reaper = Reaper(_FILES, step)
        sys.setprofile(reaper)
        scenario(folder)
        sys.setprofile(None)
        os.write(write, str(reaper.num_steps).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as told:
        num_steps = int(told.read() or 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if step else 0), f"step {step}"
    return num_steps


def main() -> None:
    """See above."""
    folder, scenario, stride = Path(sys.argv[1]), SCENARIOS[sys.argv[2]], int(sys.argv[3])
    prepared = folder / "prepared"
    with archive.open_archive(prepared, defaults=_policy(), max_draft_bytes=10**6) as opened:
        publish(opened, 1)
    shutil.copytree(prepared, folder / "whole")
    for step in range(1, _die(folder / "whole", scenario, 0), stride):
        shutil.copytree(prepared, folder / str(step))
        _die(folder / str(step), scenario, step)


if __name__ == "__main__":
    main()

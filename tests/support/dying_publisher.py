"""Publishes a second version and dies at its n-th step: `python -m tests.support.dying_publisher FOLDER STEP`.

A step is any call or return of the registry's own functions, or of what they call in C (write, fsync, rename, execute): a
profile function counts them and kills the process, so that no hook is needed in the code under test. Prints the number of
steps when it got to the end.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from tests.support.checkpoints import draft, evaluation
from tests.support.versions import NOW_MS

from updraft.registry.v1 import registry_pb2
from updraft_registry import archive, catalogue
from updraft_registry.rollout import decide
from updraft_registry.stores import folder as folder_store
from updraft_registry.version import Policy

_FILES = {archive.__file__, catalogue.__file__, folder_store.__file__}


class Reaper:
    """Kills this process at the n-th step; counts them all for 0."""

    def __init__(self, fatal_step: int) -> None:
        self._fatal_step = fatal_step
        self.num_steps = 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if frame.f_code.co_filename in _FILES:
            self.num_steps += 1
            if self.num_steps == self._fatal_step:
                os.kill(os.getpid(), signal.SIGKILL)


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
    speculator = opened.catalogue.speculator("default")
    decision = decide(speculator.wish, speculator.versions, [], NOW_MS)
    if decision.transitions:
        opened.record("default", decision.transitions)


def main() -> None:
    """See above."""
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    with archive.open_archive(folder, defaults=Policy(), max_draft_bytes=10**6) as opened:
        opened.recover(NOW_MS)
        publish(opened, 1)
        reaper = Reaper(step)
        sys.setprofile(reaper)
        publish(opened, 2)
        sys.setprofile(None)
    sys.stdout.write(f"{reaper.num_steps}\n")


if __name__ == "__main__":
    main()

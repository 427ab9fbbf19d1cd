"""Data folders of stacks that run, without their processes."""

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from updraft_cli.local.data_folder import DataFolder, StackState
from updraft_cli.local.process import ProcessState

_NOBODY = "http://127.0.0.1:1/metrics"
"""Nobody listens there."""


def start(folder: Path, *, registry_address: str = "", processes: Sequence[ProcessState] = ()) -> Path:
    """Leave the note of a stack that this process runs."""
    folder.mkdir(parents=True)
    state = StackState(
        pid=os.getpid(),
        created_unix_s=psutil.Process().create_time(),
        updraft_version="1",
        model=folder.name,
        speculator="default",
        inference_url="",
        registry_address=registry_address,
        redis_url="",
        metrics_urls={"inference": _NOBODY, "trainer": _NOBODY},
        processes=tuple(processes),
    )
    DataFolder(folder).write_state(state)
    return folder

"""Data folders of stacks that run, without their processes."""

import os
from pathlib import Path

import psutil

from updraft_cli.local.data_folder import DataFolder, StackState


def start(folder: Path) -> Path:
    """Leave the note of a stack that this process runs."""
    folder.mkdir(parents=True)
    state = StackState(
        pid=os.getpid(),
        created_unix_s=psutil.Process().create_time(),
        updraft_version="1",
        model=folder.name,
        speculator="default",
        inference_url="",
        registry_address="",
        redis_url="",
        metrics_urls={},
        processes=[],
    )
    DataFolder(folder).write_state(state)
    return folder

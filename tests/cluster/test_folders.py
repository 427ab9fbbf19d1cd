"""A node of a killed process is removed by the next one, and a disk that is too small for a node is one sentence."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.cluster import cgroups, folders, tours
from tests.cluster import cluster as clusters
from tests.cluster.cluster import Cluster, ClusterError, cluster
from tests.cluster.programs import CHECKOUT
from tests.support.disk import small_disk
from tests.support.wait import wait_until

_OWNER = """
import time
from tests.cluster.cluster import cluster
with cluster() as node:
    print(node.folder, flush=True)
    time.sleep(600)
"""


def test_a_node_of_a_killed_process_is_removed_by_the_next_one_and_others_are_not(node: Cluster) -> None:
    command = [sys.executable, "-c", _OWNER]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            line = owner.stdout.readline().strip()
        finally:
            owner.kill()
    assert line, "it has started"
    folder = Path(line)

    clusters.make_room()

    # Another run of tests may have been first, and not be done.
    wait_until(lambda: not folder.exists(), what="the end of the folder")
    assert cgroups.existing(clusters.cgroup(folder)) == []
    assert clusters.is_up(node.folder)


def test_a_disk_that_is_too_small_for_a_node_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := tours.obstacle():
        pytest.skip(why)
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(ClusterError) as refused, cluster():
            raise AssertionError("it starts")
        assert str(refused.value) == f"a node needs 2.0 GB of disk in {disk}, but only 0.0 GB are free"
        assert list(disk.iterdir()) == []


def test_a_folder_that_somebody_else_has_made_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("another user can be had by root only")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with folders.owned() as dead:
        pass
    theirs = tmp_path / "updraft-node-theirs"
    shutil.copytree(dead, theirs)
    os.chown(theirs, 65534, 65534)

    assert list(folders.abandoned()) == [dead]


def test_a_removal_that_was_cut_off_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount what cannot be removed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with folders.owned() as folder, small_disk(folder / "busy", 1 << 16):
        (folder / "volumes").mkdir()
        folders.remove(folder)
        assert not (folder / "volumes").exists()

    assert list(folders.abandoned()) == [folder]
    folders.remove(folder)
    assert list(tmp_path.iterdir()) == []

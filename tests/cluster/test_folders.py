"""A node of a killed process is removed by the next one, and a disk that is too small for a node is one sentence."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.cluster import cgroups, tours
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
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        owner.kill()

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
        assert str(refused.value) == f"for a node, 2.0 GB of disk are needed in {disk}, and 0.0 GB are free"
        assert list(disk.iterdir()) == []

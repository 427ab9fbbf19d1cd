"""A node takes images that were unpacked before its start; what it does with them changes nothing for another."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster import programs, tours
from tests.cluster.cluster import Cluster, ClusterError, cluster
from tests.cluster.dockerfiles import Builder
from tests.cluster.layout import Layout
from tests.cluster.unpacked import Unpacked, share
from tests.support.disk import small_disk
from tests.support.wait import wait_until

TOY = "docker.io/library/toy:1"
_CTR = ("ctr", "-n", "k8s.io")
_MOUNTED = "/run/updraft/mounted"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """An OCI layout with the toy in it."""
    if why := tours.obstacle():
        pytest.skip(why)
    made = Layout(Builder(tmp_path_factory.mktemp("builder")))
    _put(made, TOY, "served")
    return made


@pytest.fixture(scope="module")
def unpacked(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    return Unpacked(layout.folder, tmp_path_factory.mktemp("unpacked"))


def _put(layout: Layout, reference: str, content: str) -> None:
    context = layout.builder.folder / "context"
    context.mkdir(exist_ok=True)
    shutil.copy(programs.path("toy"), context / "program")
    (context / "content").write_text(content)
    (context / "Dockerfile").write_text(
        'FROM scratch\nCOPY program content /\nUSER 10001\nENTRYPOINT ["/program", "serve"]\n'
    )
    layout.builder.build(context, reference)
    layout.put(reference, content)


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def other(unpacked: Unpacked, tmp_path: Path) -> Iterator[Path]:
    """The images as another node has them; at the end they are as they were."""
    unpacked.give(tmp_path)
    before = _digests(tmp_path)
    yield tmp_path
    assert _digests(tmp_path) == before


def test_a_node_that_changes_and_removes_shared_images_takes_nothing_from_another(
    unpacked: Unpacked, other: Path
) -> None:
    with cluster(unpacked.give) as node:
        folder = node.folder / "containerd"
        assert len(_inodes(folder) & _inodes(other)) >= 4, "two files of the layer, its archive, the manifest"
        _run(node)
        node.enter("mkdir", _MOUNTED)
        node.enter(*_CTR, "images", "mount", "--rw", TOY, _MOUNTED)
        node.enter("sh", "-c", f"echo changed > {_MOUNTED}/content; rm {_MOUNTED}/program")
        node.enter(*_CTR, "images", "unmount", "--rm", _MOUNTED)
        names = node.enter(*_CTR, "images", "ls", "--quiet").split()
        node.enter(*_CTR, "images", "rm", "--sync", *(name for name in names if "pause" not in name))
        wait_until(lambda: not _inodes(folder) & _inodes(other), what="the end of the images in the node")


def _run(node: Cluster) -> None:
    """A pod of the image that is ended again."""
    spec = {"containers": [{"name": "main", "image": TOY}], "terminationGracePeriodSeconds": 0}
    with node.api() as api:
        api.create("/api/v1/namespaces/default/pods", {"metadata": {"name": "toy"}, "spec": spec})
        pod = "/api/v1/namespaces/default/pods/toy"
        wait_until(lambda: bool(api.get(pod)["status"]["phase"] == "Running"), what="the start of the pod")
        api.delete(pod)
        wait_until(lambda: not api.exists(pod), what="the end of the pod")


def test_images_are_unpacked_anew_when_they_have_changed_and_nodes_keep_theirs(layout: Layout, tmp_path: Path) -> None:
    unpacked = Unpacked(layout.folder, tmp_path / "unpacked")
    nodes = [tmp_path / name for name in ("first", "second", "third")]
    for node in nodes:
        node.mkdir()
    unpacked.give(nodes[0])
    unpacked.give(nodes[1])
    assert _inodes(nodes[0]) & _inodes(nodes[1])
    before = _digests(nodes[0])

    _put(layout, TOY, "served otherwise")
    unpacked.give(nodes[2])

    assert _digests(nodes[0]) == before
    texts = [path.read_text() for path in nodes[2].rglob("content")]
    assert texts == ["served otherwise"]
    assert len(list(unpacked.folder.iterdir())) == 1, "the older ones are removed"


def test_on_another_file_system_a_node_gets_a_copy(unpacked: Unpacked, other: Path, tmp_path: Path) -> None:
    root = other / "containerd"
    with small_disk(tmp_path / "disk", 1 << 30) as disk:
        share(root, disk / "containerd")
        assert _digests(disk / "containerd") == _digests(root)


def test_a_disk_without_room_for_the_images_is_said_before_they_are_unpacked(layout: Layout, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        with pytest.raises(
            ClusterError, match=r"^for images that are unpacked, [\d.]+ GB of disk are needed in .*, and [\d.]+ GB"
        ):
            Unpacked(layout.folder, disk / "unpacked").give(tmp_path)
        assert list((disk / "unpacked").iterdir()) == []

"""A node takes images that were unpacked before its start; what it does with them changes nothing for another."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.cluster import programs, tours
from tests.cluster.cluster import Cluster, ClusterError, cluster
from tests.cluster.dockerfiles import Builder
from tests.cluster.layout import Layout
from tests.cluster.unpacked import Unpacked, share
from tests.support.disk import small_disk
from tests.support.wait import wait_until

from updraft_artifacts.digests import file_digest

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
    layout.put(reference, layout.builder.buildah("images", "--quiet", "--no-trunc", reference).strip())


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files below a folder from which a node may be removing some."""
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield Path(where, name), Path(where, name).lstat()


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_digest(path) for path, _ in _files(folder)}


def _inodes(folder: Path) -> set[tuple[int, int]]:
    return {(status.st_dev, status.st_ino) for _, status in _files(folder)}


@pytest.fixture
def other(unpacked: Unpacked, tmp_path: Path) -> Iterator[Path]:
    """The images as another node has them; at the end they are as they were."""
    node = tmp_path / "other"
    node.mkdir()
    unpacked.give(node)
    before = _digests(node)
    yield node
    assert _digests(node) == before


def test_a_node_that_changes_and_removes_shared_images_takes_nothing_from_another(
    unpacked: Unpacked, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(other.parent))  # on the same file system
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


def test_what_killed_processes_left_is_no_obstacle(layout: Layout, tmp_path: Path) -> None:
    unpacked = Unpacked(layout.folder, tmp_path / "unpacked")
    (unpacked.folder / "part-1" / "containerd").mkdir(parents=True)
    stray = layout.folder / "blobs" / "sha256" / ("0" * 64)
    stray.write_text("of a push that was killed")
    try:
        unpacked.give(tmp_path)
    finally:
        stray.unlink()
    assert [path.name for path in unpacked.folder.iterdir() if path.name.startswith("part")] == []


def test_a_layout_takes_the_image_that_it_was_told_of_when_another_has_got_its_name(layout: Layout) -> None:
    builder = layout.builder
    _put(layout, TOY, "ours")
    ours = builder.buildah("images", "--quiet", "--no-trunc", TOY).strip()
    before = (layout.folder / "index.json").read_text()
    _put(layout, TOY, "theirs")
    assert (layout.folder / "index.json").read_text() != before

    layout.put(TOY, ours)

    assert (layout.folder / "index.json").read_text() == before


def test_on_another_file_system_a_node_gets_a_copy(unpacked: Unpacked, other: Path, tmp_path: Path) -> None:
    root = other / "containerd"
    with small_disk(tmp_path / "disk", 1 << 30) as disk:
        share(root, disk / "containerd")
        assert _digests(disk / "containerd") == _digests(root)


def test_a_disk_without_room_for_the_images_is_said_before_they_are_unpacked(layout: Layout, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        with pytest.raises(ClusterError, match=r"^unpacking the images needs [\d.]+ GB of disk in "):
            Unpacked(layout.folder, disk / "unpacked").give(tmp_path)
        assert list((disk / "unpacked").iterdir()) == []

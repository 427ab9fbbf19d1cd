"""The parts that need no cluster: the build, the choice of programs, the start of a program, the packing of an image."""

import threading
from pathlib import Path

import pytest
from tests.cluster import images, programs
from tests.cluster.build import BuildError, build, find_go
from tests.cluster.daemon import Daemon, StartError

PODS = [module for module in programs.MODULES if module.name == "pods"]


@pytest.fixture
def go() -> str:
    """Go itself."""
    found = find_go()
    if found is None:
        pytest.skip("Go is not installed")
    return found


def test_two_builds_at_once_build_each_program_once(go: str, tmp_path: Path) -> None:
    told: list[str] = []
    folder = tmp_path / "bin"
    builds = [threading.Thread(target=lambda: build(told.append, go=go, folder=folder, modules=PODS)) for _ in range(2)]
    for thread in builds:
        thread.start()
    for thread in builds:
        thread.join()

    assert {path.name for path in folder.iterdir()} == {"pause", "toy"}
    assert len([line for line in told if line.startswith("  ")]) == 2


def test_a_build_that_was_cut_off_goes_on_with_what_is_missing(go: str, tmp_path: Path) -> None:
    told: list[str] = []
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "toy").write_bytes(b"built before")
    (folder / ".pause.part").write_bytes(b"half a program")

    build(told.append, go=go, folder=folder, modules=PODS)

    assert (folder / "toy").read_bytes() == b"built before"
    assert (folder / "pause").stat().st_size > 100_000
    assert told[1].startswith("  1/1 pause")


def test_a_build_without_go_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="Go is not installed"):
        build(lambda _: None, go=None, folder=tmp_path / "bin", modules=PODS)


def test_programs_of_the_users_own_come_before_those_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    (tmp_path / "etcd").touch()

    assert programs.path("etcd") == tmp_path / "etcd"


def test_a_program_that_is_nowhere_is_asked_for_in_a_sentence() -> None:
    with pytest.raises(programs.MissingProgramError, match="run `make cluster-build`"):
        programs.path("kube-nothing")


def test_a_program_that_ends_too_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    daemon = Daemon("etcd", ["sh", "-c", "echo no room left; exit 3"], tmp_path)

    with pytest.raises(StartError, match=r"etcd ended with status 3:\nno room left"):
        daemon.wait_until(lambda: False, what="a start")


def test_the_same_program_is_packed_into_the_same_image(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    for name in ("one", "two"):
        images.pack(tmp_path / name, "localhost/program:1", program)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

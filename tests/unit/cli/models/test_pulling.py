"""A folder that is pulled into: whole, cut off, shared, full, or for something else."""

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from tests.support.disk import file_size_limit

from updraft_chassis.errors import Conflict, Exhausted, InvalidInput, Unavailable
from updraft_cli.models.pulling import pull
from updraft_cli.models.source import Address, File, Listing, address, taken

MODEL = address("hf://org/name")


class FolderSource:
    """Files of a folder; `breaks_at` names one at which the connection is lost, once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.breaks_at = ""
        self.fetched: list[str] = []

    def opened(self, _: Address) -> "FolderSource":
        return self

    def listing(self, revision: str) -> Listing:
        files = [
            File(name=path.name, size_bytes=path.stat().st_size, tag=sha256(path.read_bytes()).hexdigest())
            for path in self._folder.iterdir()
        ]
        return Listing(revision=revision or "commit", files=taken("a folder", files))

    def arrived_bytes(self, folder: Path) -> int:
        return 0

    def fetch(
        self,
        _: Listing,
        files: Iterable[File],
        folder: Path,
        done: Callable[[File], None],
        *,
        is_alone: bool = True,
    ) -> None:
        for file in files:
            if file.name == self.breaks_at:
                self.breaks_at = ""
                raise Unavailable("the connection was lost")
            self.fetched.append(file.name)
            part = folder / f".{file.name}.part"
            shutil.copy(self._folder / file.name, part)
            part.rename(folder / file.name)
            done(file)


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(b"one" * 1000)
    (folder / "model-2.safetensors").write_bytes(b"two" * 1000)
    return FolderSource(folder)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".updraft"}


def test_a_folder_gets_all_files_and_then_is_left_as_it_is(source: FolderSource, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "one"
    pull(MODEL, folder, opened=source.opened)
    assert _names(folder) == {"config.json", "model-1.safetensors", "model-2.safetensors"}
    assert (folder / "model-2.safetensors").read_bytes() == b"two" * 1000
    source.fetched.clear()
    assert pull(MODEL, folder, opened=source.opened).is_whole
    assert source.fetched == []


def test_a_whole_folder_needs_neither_the_source_nor_a_disk_that_can_be_written(
    source: FolderSource, tmp_path: Path
) -> None:
    pull(MODEL, tmp_path / "one", opened=source.opened)
    (tmp_path / "one" / ".updraft" / "lock").unlink()

    def away(_: Address) -> FolderSource:
        raise Unavailable("the source is away")

    pull(MODEL, tmp_path / "one", opened=away)
    assert not (tmp_path / "one" / ".updraft" / "lock").exists()


def test_a_pull_that_was_cut_off_goes_on_with_what_is_missing(source: FolderSource, tmp_path: Path) -> None:
    source.breaks_at = "model-2.safetensors"
    with pytest.raises(Unavailable):
        pull(MODEL, tmp_path / "one", opened=source.opened)
    (tmp_path / "one" / ".left.part").write_text("of one who was killed")
    source.fetched.clear()
    record = pull(MODEL, tmp_path / "one", opened=source.opened)
    assert source.fetched == ["model-2.safetensors"]
    assert record.is_whole
    assert record.revision == "commit"
    assert ".left.part" not in _names(tmp_path / "one")


def test_what_the_source_replaced_meanwhile_is_brought_again(source: FolderSource, tmp_path: Path) -> None:
    source.breaks_at = "model-2.safetensors"
    with pytest.raises(Unavailable):
        pull(MODEL, tmp_path / "one", opened=source.opened)
    (tmp_path / "source" / "model-1.safetensors").write_bytes(b"new" * 1000)
    pull(MODEL, tmp_path / "one", opened=source.opened)
    assert (tmp_path / "one" / "model-1.safetensors").read_bytes() == b"new" * 1000


def test_a_file_that_somebody_took_away_is_brought_again(source: FolderSource, tmp_path: Path) -> None:
    pull(MODEL, tmp_path / "one", opened=source.opened)
    (tmp_path / "one" / "config.json").unlink()
    source.fetched.clear()
    pull(MODEL, tmp_path / "one", opened=source.opened)
    assert source.fetched == ["config.json"]


def test_a_folder_for_something_else_is_refused(source: FolderSource, tmp_path: Path) -> None:
    pull(MODEL, tmp_path / "one", opened=source.opened)
    with pytest.raises(Conflict, match="holds hf://org/name: name another folder"):
        pull(address("hf://org/other"), tmp_path / "one", opened=source.opened)
    with pytest.raises(Conflict, match="holds hf://org/name"):
        pull(address("hf://org/name", "v2"), tmp_path / "one", opened=source.opened)


def test_files_that_no_pull_brought_are_not_touched(source: FolderSource, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("my own")
    with pytest.raises(Conflict, match=r"holds files that were not pulled, such as config\.json"):
        pull(MODEL, tmp_path / "mine", opened=source.opened)
    assert (tmp_path / "mine" / "config.json").read_text() == "my own"


def test_the_empty_root_of_a_new_volume_is_a_folder_like_any(source: FolderSource, tmp_path: Path) -> None:
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    assert pull(MODEL, tmp_path / "volume", opened=source.opened).is_whole


def test_two_at_once_bring_each_file_once(source: FolderSource, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(pull, MODEL, tmp_path / "one", opened=source.opened) for _ in range(4)]
        assert all(future.result().is_whole for future in running)
    assert sorted(source.fetched) == ["config.json", "model-1.safetensors", "model-2.safetensors"]


def test_a_full_disk_is_one_sentence_and_what_fitted_is_kept(source: FolderSource, tmp_path: Path) -> None:
    with file_size_limit(2000), pytest.raises(Exhausted, match=r"the disk of .* is full"):
        pull(MODEL, tmp_path / "one", opened=source.opened)
    source.fetched.clear()
    pull(MODEL, tmp_path / "one", opened=source.opened)
    assert "config.json" not in source.fetched


def test_a_place_that_cannot_be_written_is_one_sentence(source: FolderSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInput, match=r"cannot write to .*file/here"):
        pull(MODEL, tmp_path / "file" / "here", opened=source.opened)


def test_a_damaged_record_is_one_sentence(source: FolderSource, tmp_path: Path) -> None:
    pull(MODEL, tmp_path / "one", opened=source.opened)
    (tmp_path / "one" / ".updraft" / "pull.json").write_text("[")
    with pytest.raises(InvalidInput, match=r"pull.json is damaged: remove"):
        pull(MODEL, tmp_path / "one", opened=source.opened)


def test_a_pull_that_begins_while_another_one_ends_finds_its_record(
    source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def read_too_early(path: Path) -> str:
        monkeypatch.setattr(Path, "read_text", read_text)
        pull(MODEL, tmp_path / "one", opened=source.opened)
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read_too_early)
    assert pull(MODEL, tmp_path / "one", opened=source.opened).is_whole
    assert sorted(source.fetched) == ["config.json", "model-1.safetensors", "model-2.safetensors"]

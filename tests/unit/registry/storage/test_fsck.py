"""fsck and rebuild, against real damage: what is found, what is mended, and what is left alone."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.archives import Opened
from tests.support.checkpoints import draft, evaluation, sha256
from tests.support.disk import file_size_limit

from updraft.registry.v1 import registry_pb2
from updraft_registry.storage.maintenance import DAMAGED, FAILED, SOUND, main
from updraft_rollouts.terms import Phase

TRAINER = registry_pb2.SOURCE_TRAINER


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Version 1 superseded, 2 stable, 3 rejected and with its weights; a pin that was taken back."""
    archive = Opened(tmp_path / "registry")
    archive.publish(draft(1))
    archive.settle()
    archive.publish(draft(2), source=TRAINER, evaluation=evaluation(baseline=1))
    archive.settle()
    archive.publish(draft(3), source=TRAINER)
    archive.settle()
    archive.pin(1, "the second is slow")
    archive.pin(None, "it is not")
    assert archive.phases() == {1: Phase.SUPERSEDED, 2: Phase.STABLE, 3: Phase.REJECTED}
    yield archive
    archive.close()


class Command:
    """`updraft-registry <arguments>` on the folder, after the archive was closed."""

    def __init__(self, opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
        self._opened = opened
        self._capsys = capsys

    def __call__(self, *arguments: str) -> int:
        self._opened.close()
        self.status = main([*arguments, "--data-dir", str(self._opened.folder)])
        self.out, self.err = self._capsys.readouterr()
        return self.status

    def kinds(self, *arguments: str) -> dict[str, list[str]]:
        """What is found, by kind; damage only."""
        self("fsck", "--output", "json", *arguments)
        findings = json.loads(self.out)["findings"]
        kinds: dict[str, list[str]] = {}
        for finding in findings:
            if finding["is_damage"]:
                kinds.setdefault(finding["kind"], []).append(finding["subject"])
        return kinds


@pytest.fixture
def command(opened: Opened, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(opened, capsys)


def test_a_folder_that_is_as_it_should_be_is_sound_and_stays_so(opened: Opened, command: Command) -> None:
    before = contents(opened.folder)
    assert command("fsck") == SOUND
    assert command.out == "3 versions; no damage\n"
    assert command("fsck", "--repair") == SOUND
    assert command("rebuild") == SOUND
    after = contents(opened.folder)
    assert {name: after[name] for name in before} == before


def test_a_flipped_bit_is_found_and_its_version_steps_back(opened: Opened, command: Command) -> None:
    flip(opened.blob(draft(2)))
    assert command.kinds() == {"flipped blob": [draft(2).digest], "lost weights": ["default/2"]}
    assert command.status == DAMAGED
    assert command.kinds("--no-hash") == {}
    assert command("fsck", "--repair") == SOUND
    assert "repaired flipped blob" in command.out
    opened.reopen()
    opened.settle()
    assert opened.phases()[2] is Phase.SUPERSEDED
    assert opened.phases()[1] is Phase.STABLE, "what won before serves"
    assert opened.publish(draft(2), source=TRAINER, evaluation=evaluation(baseline=1)) == (2, True)
    opened.settle()
    assert opened.phases()[2] is Phase.STABLE, "and comes back with its weights"


def test_weights_that_are_put_back_are_kept_again(opened: Opened, command: Command) -> None:
    blob = opened.blob(draft(2))
    whole = blob.read_bytes()
    blob.unlink()
    assert command.kinds() == {"lost weights": ["default/2"]}
    assert command("fsck", "--repair") == SOUND
    blob.write_bytes(whole)
    assert command("fsck") == SOUND
    assert "note     returned weights default/2" in command.out
    assert command("fsck", "--repair") == SOUND
    opened.reopen()
    opened.settle()
    assert opened.phases()[2] is Phase.STABLE


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:100]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes().replace(b"STABLE", b"FAILED")), id="changed"),
        pytest.param(lambda path: path.write_bytes(b"\xff\x00"), id="rubbish"),
    ],
)
def test_a_document_that_does_not_say_what_its_row_says_is_written_anew(
    opened: Opened, command: Command, damage: Callable[[Path], object]
) -> None:
    document = opened.folder / "versions" / "default" / "2.json"
    whole = document.read_bytes()
    damage(document)
    assert command.kinds() == {"document": ["default/2"]}
    assert command("fsck", "--repair") == SOUND
    assert document.read_bytes() == whole


def test_a_document_without_a_row_gets_it_and_rubbish_without_one_is_told(opened: Opened, command: Command) -> None:
    opened.close()
    documents = opened.folder / "versions" / "default"
    (documents / "9.json").write_text('{"version": 9}')
    with closing(sqlite3.connect(opened.folder / "catalogue.sqlite3")) as database:
        for table in ("transitions", "versions"):
            database.execute(f"DELETE FROM {table} WHERE number = 3")  # noqa: S608 - two names of ours
        database.commit()
    assert command.kinds() == {"missing row": ["default/3"], "document": ["default/9"]}
    assert command("fsck", "--repair") == DAMAGED
    assert "repaired missing row" in command.out
    assert "left     document         default/9: it has no row and cannot be read" in command.out
    (documents / "9.json").unlink()
    assert command("fsck") == SOUND
    opened.reopen()
    assert opened.phases()[3] is Phase.REJECTED
    assert [event.reason for event in opened.history(3).values()][-1].startswith("published")


def test_leftovers_are_deleted_and_strays_are_no_damage(opened: Opened, command: Command) -> None:
    (opened.folder / "uploads" / "a.part").write_bytes(b"half")
    stray = opened.folder / "blobs" / "sha256" / sha256(b"stray").removeprefix("sha256:")
    stray.write_bytes(b"stray")
    assert command.kinds() == {"leftover": [str(opened.folder / "uploads" / "a.part")]}
    assert command("fsck", "--repair") == SOUND
    assert "note     stray blob" in command.out
    assert stray.exists()
    assert list((opened.folder / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b"\xff" * 8192), id="rubbish"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-5000]), id="truncated"),
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: edit(path, "UPDATE versions SET manifest = x'ffff' WHERE number = 2"), id="manifest"),
        pytest.param(
            lambda path: edit(path, "UPDATE versions SET manifest = x'' WHERE number = 2"), id="empty manifest"
        ),
        pytest.param(lambda path: edit(path, "UPDATE versions SET phase = 'Nonsense' WHERE number = 3"), id="phase"),
        pytest.param(lambda path: edit(path, "PRAGMA foreign_keys = OFF; DELETE FROM speculators"), id="orphans"),
    ],
)
def test_a_damaged_catalogue_is_made_anew_with_everything_in_it(
    opened: Opened, command: Command, damage: Callable[[Path], object]
) -> None:
    before = opened.archive.catalogue.speculator("default"), list(opened.history().items())
    opened.close()
    path = opened.folder / "catalogue.sqlite3"
    damage(path)
    was_there = path.exists()
    assert list(command.kinds()) == ["catalogue"]
    assert command.status == DAMAGED
    assert "updraft registry fsck --repair" in (command("fsck"), command.out)[1]
    assert command("fsck", "--repair") == SOUND
    opened.reopen()
    assert (opened.archive.catalogue.speculator("default"), list(opened.history().items())) == before
    assert len(list(opened.folder.glob("catalogue.sqlite3.2*"))) == was_there, "the old one is kept"


def test_a_rebuild_of_a_sound_catalogue_loses_nothing_that_no_document_says_yet(
    opened: Opened, command: Command
) -> None:
    opened.archive.catalogue.pause("default", is_paused=True, reason="lunch", now_ms=1)
    before = opened.archive.catalogue.speculator("default"), list(opened.history().items())
    assert command("rebuild") == SOUND
    assert "3 versions; no damage" in command.out
    opened.reopen()
    assert (opened.archive.catalogue.speculator("default"), list(opened.history().items())) == before


@pytest.mark.parametrize("arguments", [("rebuild",), ("fsck", "--repair")])
def test_on_a_full_disk_the_old_catalogue_stays(opened: Opened, command: Command, arguments: tuple[str, ...]) -> None:
    opened.close()
    catalogue = opened.folder / "catalogue.sqlite3"
    if arguments == ("fsck", "--repair"):
        catalogue.write_bytes(catalogue.read_bytes()[:-5000])
    before = catalogue.read_bytes()
    with file_size_limit(8192):
        assert command(*arguments) == FAILED
    assert "is full; nothing was changed" in command.err
    assert catalogue.read_bytes() == before
    assert command(*arguments) == SOUND


def test_a_rebuild_does_not_begin_while_a_document_cannot_be_brought_up_to_date(
    opened: Opened, command: Command
) -> None:
    for _ in range(150):
        opened.archive.catalogue.pause("default", is_paused=True, reason="x" * 600, now_ms=1)
    before = opened.archive.catalogue.speculator("default"), list(opened.history().items())
    with file_size_limit(64 * 1024):
        assert command("rebuild") == FAILED
    assert "documents are older than the catalogue and cannot be written" in command.err
    assert command("rebuild") == SOUND
    opened.reopen()
    assert (opened.archive.catalogue.speculator("default"), list(opened.history().items())) == before


def test_a_rebuild_loses_no_version_whose_document_cannot_be_read(opened: Opened, command: Command) -> None:
    (opened.folder / "versions" / "default" / "2.json").write_bytes(b"rubbish")
    before = opened.archive.catalogue.speculator("default"), list(opened.history().items())
    assert command("rebuild") == SOUND
    opened.reopen()
    assert (opened.archive.catalogue.speculator("default"), list(opened.history().items())) == before


def test_what_an_interrupted_rebuild_left_is_in_nobodys_way(opened: Opened, command: Command) -> None:
    for suffix in ("", "-wal", "-shm"):
        (opened.folder / f"catalogue.sqlite3.new{suffix}").write_bytes(b"half")
    assert command("rebuild") == SOUND
    assert not list(opened.folder.glob("catalogue.sqlite3.new*"))


def test_an_old_log_is_never_replayed_into_a_new_catalogue(opened: Opened, command: Command) -> None:
    opened.close()
    log = opened.folder / "catalogue.sqlite3-wal"
    with closing(sqlite3.connect(opened.folder / "catalogue.sqlite3")) as database:
        database.execute("UPDATE versions SET phase = 'Failed'")
        database.commit()
        torn = log.read_bytes()
    (opened.folder / "catalogue.sqlite3").write_bytes(b"\xff" * 4096)
    log.write_bytes(torn)
    assert command("fsck", "--repair") == SOUND
    assert not log.exists()
    opened.reopen()
    assert opened.phases() == {1: Phase.SUPERSEDED, 2: Phase.STABLE, 3: Phase.REJECTED}


def test_nothing_is_touched_while_a_registry_works_in_the_folder(
    opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("fsck", "rebuild"):
        assert main([name, "--data-dir", str(opened.folder)]) == FAILED
        assert "another registry uses" in capsys.readouterr().err


def test_a_folder_without_a_registry_is_told_and_left_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fsck", "--data-dir", str(tmp_path)]) == FAILED
    assert "is not a data folder of a registry" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_catalogue_of_an_older_release_is_left_alone_until_it_is_repaired(opened: Opened, command: Command) -> None:
    opened.close()
    edit(opened.folder / "catalogue.sqlite3", "PRAGMA user_version = 1")
    assert command("fsck") == FAILED
    assert "has schema 1: start this registry once, or repair" in command.err


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the catalogue."""
    files = (path for path in folder.rglob("*") if path.is_file() and "catalogue" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)


def edit(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(script)
        database.commit()

from pathlib import Path

import pytest
from tests.support.draft_folders import manifest, write_version

from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_inference.agent.drafts import DraftFolder, check_target, verified
from updraft_inference.engine import EngineInfo

INFO = EngineInfo(
    engine="fake/1",
    target_fingerprint="sha256:target",
    tokenizer_fingerprint="sha256:tokenizer",
    max_context=1,
    num_slots=1,
    vocab_size=1,
    eos_token_ids=frozenset(),
)


def test_what_served_last_is_remembered_over_a_restart(tmp_path: Path) -> None:
    assert DraftFolder(tmp_path / "new").remembered() == 0

    DraftFolder(tmp_path / "new").remember(7)
    assert DraftFolder(tmp_path / "new").remembered() == 7
    DraftFolder(tmp_path / "new").remember(0)
    assert DraftFolder(tmp_path / "new").remembered() == 0


@pytest.mark.parametrize("note", ["", "{", "[]", '{"version": "x"}', "{}"])
def test_a_broken_note_is_no_note(tmp_path: Path, note: str) -> None:
    (tmp_path / "serving.json").write_text(note)

    assert DraftFolder(tmp_path).remembered() == 0


def test_only_whole_versions_count(tmp_path: Path) -> None:
    for name in ("2", "10", "3-abc.part", "other"):
        (tmp_path / name).mkdir()

    assert DraftFolder(tmp_path).versions == [2, 10]
    assert DraftFolder(tmp_path / "absent").versions == []


def test_the_cache_keeps_what_is_wanted_and_the_last_two_that_served(tmp_path: Path) -> None:
    drafts = DraftFolder(tmp_path)
    for version in range(1, 8):
        write_version(tmp_path, version, b"w")
    for name in ("7-abc.part", "1-abc.part"):
        (tmp_path / name).mkdir()
    for version in (1, 2, 3):
        drafts.remember(version)

    drafts.prune({6, 7})

    assert drafts.versions == [2, 3, 6, 7]
    assert [part.name for part in tmp_path.glob("*.part")] == ["7-abc.part"]


def test_a_flipped_bit_on_disk_is_noticed(tmp_path: Path) -> None:
    folder = write_version(tmp_path, 1, b"weights")
    assert verified(folder, 1, INFO).tensors_digest == manifest(b"weights").tensors_digest

    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(Corrupt):
        verified(folder, 1, INFO)


@pytest.mark.parametrize("broken", ["", "{", '{"digest": 5}'])
def test_a_broken_manifest_is_noticed(tmp_path: Path, broken: str) -> None:
    folder = write_version(tmp_path, 1, b"weights")
    (folder / "manifest.json").write_text(broken)

    with pytest.raises(Corrupt):
        verified(folder, 1, INFO)


@pytest.mark.attack(boundary="drafts", attack="a draft for another target", outcome="refused; the old draft serves on")
def test_a_draft_for_another_target_is_refused_with_both() -> None:
    check_target(manifest(b"w"), INFO)
    check_target(manifest(b"w", target=""), INFO)

    with pytest.raises(InvalidInput, match=r"sha256:other.*sha256:target"):
        check_target(manifest(b"w", target="sha256:other"), INFO)


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    for name in ("foo-x.part", "-.part"):
        (tmp_path / name).mkdir()
    for name in ("1-x.part", "2"):
        (tmp_path / name).write_text("a file")

    DraftFolder(tmp_path).prune(())

    assert sorted(path.name for path in tmp_path.iterdir()) == ["-.part", "1-x.part", "2", "foo-x.part"]

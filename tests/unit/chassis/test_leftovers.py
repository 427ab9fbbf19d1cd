"""What killed processes left is removed; what somebody may still write is not."""

from pathlib import Path

from tests.support.disk import age

from updraft_chassis.leftovers import remove_stale


def test_files_and_folders_that_were_not_written_to_for_an_hour_are_removed(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in" / "file").touch()
        (tmp_path / f"{name}-file").touch()
    age(tmp_path / "old", hours=1.1)
    age(tmp_path / "old-file", hours=1.1)
    age(tmp_path / "new", hours=0.9)
    remove_stale([*tmp_path.iterdir(), tmp_path / "missing"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new-file"]


def test_a_folder_with_one_file_that_is_being_written_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "folder" / "old").touch()
    (tmp_path / "folder" / "in" / "file").touch()
    age(tmp_path / "folder", hours=2)
    (tmp_path / "folder" / "in" / "file").write_text("more")
    remove_stale([tmp_path / "folder"])
    assert (tmp_path / "folder" / "old").exists()

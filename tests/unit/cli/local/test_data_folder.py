import os
import stat
from pathlib import Path

import psutil
import pytest

from updraft_chassis.errors import Conflict, Exhausted, InvalidInput
from updraft_cli.local.data_folder import DataFolder, StackState
from updraft_cli.local.process import ProcessState


def test_a_second_owner_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with (
        DataFolder(tmp_path).hold(),
        pytest.raises(Conflict, match=rf"updraft \(pid {os.getpid()}\) runs on"),
        DataFolder(tmp_path).hold(),
    ):
        pass


def test_a_folder_is_free_after_its_owner_and_its_old_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("4242\n")
    for _ in range(2):
        with DataFolder(tmp_path).hold():
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_new_folder_is_for_this_user_only(tmp_path: Path) -> None:
    with DataFolder(tmp_path / "new" / "data").hold():
        assert stat.S_IMODE((tmp_path / "new" / "data").stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    in_the_way = DataFolder(tmp_path / "file" / "data").hold()
    with pytest.raises(Exhausted, match=r"cannot use .*/data: Not a directory; choose another"), in_the_way:
        pass


def test_a_path_too_long_for_a_socket_is_told() -> None:
    with pytest.raises(InvalidInput, match="choose a shorter one with --data"):
        _ = DataFolder(Path("/", "x" * 120)).redis_socket


def test_the_state_is_what_was_written_while_its_process_lives(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    with folder.hold():
        folder.write_state(state())
        assert folder.read_state() == state()
        assert stat.S_IMODE((tmp_path / "state.json").stat().st_mode) == 0o600
    assert folder.read_state() is None


def test_the_state_of_a_process_whose_pid_another_one_has_now_is_ignored(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    with folder.hold():
        folder.write_state(state().model_copy(update={"created_unix_s": 1.0}))
        assert folder.read_state() is None


def test_a_state_of_another_version_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"pid": 1}')
    assert DataFolder(tmp_path).read_state() is None


def state() -> StackState:
    redis = ProcessState(name="redis", state="ready", pid=1, restarts=0, address="redis.sock", log="redis.log")
    return StackState(
        pid=os.getpid(),
        created_unix_s=psutil.Process().create_time(),
        updraft_version="0.1.0",
        model="/models/tiny",
        speculator="default",
        inference_url="http://127.0.0.1:8000",
        registry_address="127.0.0.1:50051",
        redis_url="unix:///tmp/redis.sock",
        metrics_urls={},
        processes=[redis],
    )

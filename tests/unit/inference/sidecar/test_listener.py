"""The agent's socket, for which several agents compete."""

import fcntl
import socket
from pathlib import Path

import pytest

from updraft_chassis.errors import InvalidInput
from updraft_inference.sidecar.listener import listening_at

SETTING = "UPDRAFT_INFERENCE_VLLM_SOCKET"


def is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def test_a_second_agent_says_that_another_one_listens(short_tmp_path: Path) -> None:
    path = short_tmp_path / "s"
    with listening_at(path, setting=SETTING):
        with pytest.raises(InvalidInput, match=rf"{path}: another program listens there.* {SETTING}"):
            listening_at(path, setting=SETTING).__enter__()

        assert is_served(path)


def test_an_agent_that_has_not_bound_yet_already_keeps_a_left_over_socket_from_others(short_tmp_path: Path) -> None:
    path = short_tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with (short_tmp_path / "s.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        with pytest.raises(InvalidInput, match="another program listens there"):
            listening_at(path, setting=SETTING).__enter__()

    assert path.is_socket()


def test_the_next_agent_listens_once_the_first_has_ended(short_tmp_path: Path) -> None:
    path = short_tmp_path / "s"
    for _ in range(2):
        with listening_at(path, setting=SETTING):
            assert is_served(path)
        assert not path.exists()


@pytest.mark.attack(
    boundary="plugin",
    attack="a program that sits on the agent's socket",
    outcome="the agent does not take it, and says so",
)
def test_the_socket_of_another_program_is_not_taken(short_tmp_path: Path) -> None:
    path = short_tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()

        with pytest.raises(InvalidInput, match="another program listens there"):
            listening_at(path, setting=SETTING).__enter__()

        assert is_served(path)


def test_a_socket_that_replaced_ours_stays(short_tmp_path: Path) -> None:
    path = short_tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        with listening_at(path, setting=SETTING):
            path.rename(short_tmp_path / "ours")
            other.bind(str(path))
        assert path.is_socket()

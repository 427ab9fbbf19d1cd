import os
import socket
from collections.abc import Iterator

import pytest

from updraft_chassis.errors import Conflict
from updraft_cli.local.ports import Ports


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port_is_told_with_its_owner_and_the_option(taken: int) -> None:
    with pytest.raises(Conflict, match=rf"port {taken} on 127\.0\.0\.1 is taken by .*--port") as raised:
        Ports(ending_s=0.0).claim(taken, option="--port")
    assert f"(pid {os.getpid()})" in str(raised.value)


def test_zero_takes_a_free_port() -> None:
    ports = Ports()
    given = [ports.claim(0, option="--port") for _ in range(5)]
    assert len(set(given)) == 5
    assert 0 not in given


def test_a_port_that_is_only_preferred_gives_way(taken: int) -> None:
    assert Ports().prefer(taken) not in {0, taken}


def test_a_port_is_not_given_twice() -> None:
    ports = Ports()
    port = ports.claim(0, option="--port")
    assert ports.prefer(port) != port
    with pytest.raises(Conflict, match="taken by another part of updraft"):
        ports.claim(port, option="--registry-port")

"""A port with a listener is not handed out."""

import socket

from updraft_chassis.ports import PORTS, free_port


def test_a_port_with_a_listener_is_skipped() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        other = free_port()
        assert free_port([taken, other]) == other


def test_by_default_no_outgoing_connection_can_take_the_port() -> None:
    assert free_port() in PORTS

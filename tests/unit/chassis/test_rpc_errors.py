"""What a failed call means to its caller, where no server can be made to say it."""

import grpc
import pytest

from updraft_chassis import rpc
from updraft_chassis.errors import Unavailable, UpdraftError

SENDING = 'Failed "execute_batch": (<grpc._cython.cygrpc.SendMessageOperation object>,)'


def failed(details: str, debug: str = "") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details, debug_error_string=debug
    )


@pytest.mark.parametrize("error", [failed(SENDING), failed("Internal error from Core", debug=SENDING)])
def test_a_connection_that_breaks_while_the_client_sends_is_an_absent_server(error: grpc.aio.AioRpcError) -> None:
    with pytest.raises(Unavailable), rpc.errors():
        raise error


def test_a_fault_of_the_server_is_none() -> None:
    with pytest.raises(UpdraftError) as caught, rpc.errors():
        raise failed("/updraft.registry.v1.Registry/List failed; see the server's log for the reason")
    assert not isinstance(caught.value, Unavailable)

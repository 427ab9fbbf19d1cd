"""The registry as the command line uses it: short calls with deadlines, one sentence when nobody answers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis import rpc
from updraft_chassis.errors import Unavailable

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

DEFAULT_ADDRESS = "127.0.0.1:50051"

TIMEOUT_S = 5.0
"""A person waits at the other end; every call but a transfer is a look into a small database."""

_PAGE_SIZE = 200
_HISTORY_LIMIT = 1000


@asynccontextmanager
async def connected(address: str) -> AsyncIterator["RegistryAsyncStub"]:
    """Yield the registry at `address`; calls in the block raise `UpdraftError`s."""
    try:
        async with rpc.channel(address) as channel:
            with rpc.errors():
                yield RegistryStub(channel)
    except Unavailable as error:
        raise Unavailable(
            f"no registry answers at {address}: start one with `updraft up`, or name another with --registry"
        ) from error


async def listing(registry: "RegistryAsyncStub", speculator: str) -> pb.ListResponse:
    """Return all versions of `speculator` ("": of all), newest first, and the speculators' states."""
    request = pb.ListRequest(speculator=speculator, page_size=_PAGE_SIZE)
    whole = await registry.List(request, timeout=TIMEOUT_S)
    request.page_token = whole.next_page_token
    while request.page_token:
        page = await registry.List(request, timeout=TIMEOUT_S)
        whole.versions.extend(page.versions)
        request.page_token = page.next_page_token
    return whole


async def history(registry: "RegistryAsyncStub", speculator: str, version: int) -> list[pb.Transition]:
    """Return what happened to one version, oldest first."""
    request = pb.HistoryRequest(speculator=speculator, limit=_HISTORY_LIMIT)
    response = await registry.History(request, timeout=TIMEOUT_S)
    return [transition for transition in reversed(response.transitions) if transition.version == version]

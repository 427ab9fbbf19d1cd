"""Calls to a registry, with deadlines, and a clear sentence when it does not answer."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Conflict, Forbidden, Unauthenticated, Unavailable

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

DEFAULT_ADDRESS = "127.0.0.1:50051"

TIMEOUT_S = 5.0
"""A person waits for the answer, and every call except a transfer reads a small database."""

_PAGE_SIZE = 200
_PODS_PAGE = 1000
_HISTORY_LIMIT = 1000

# Messages of gRPC for failed connections, and their meaning for a person. The registry itself answers in sentences.
_NO_CONNECTION = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS there; leave out --ca-file",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not from the CA in --ca-file",
    "Hostname Verification": "its certificate is for another host name than this address (--server-name)",
    "Socket closed": "it closed the connection; it may require TLS (--ca-file) or a client certificate",
    "Connection reset": "it closed the connection; it may require TLS (--ca-file) or a client certificate",
    "failed to connect": "",
    "errors resolving": "",
}


@asynccontextmanager
async def connected(address: str, credentials: Credentials | None = None) -> AsyncIterator["RegistryAsyncStub"]:
    try:
        async with rpc.channel(address, credentials) as channel:
            with rpc.errors():
                yield RegistryStub(channel)
    except Unavailable as error:
        raise Unavailable(_away(address, error), error.retry_after_s) from error
    except (Unauthenticated, Forbidden) as error:
        raise type(error)(f"{error} (--token-file, UPDRAFT_TOKEN_FILE)") from error


async def listing(registry: "RegistryAsyncStub", speculator: str) -> pb.ListResponse:
    """Return all versions of `speculator` (empty: of all), newest first, and the speculators' states."""
    request = pb.ListRequest(speculator=speculator, page_size=_PAGE_SIZE)
    whole = await registry.List(request, timeout=TIMEOUT_S)
    request.page_token = whole.next_page_token
    while request.page_token:
        page = await registry.List(request, timeout=TIMEOUT_S)
        whole.versions.extend(page.versions)
        request.page_token = page.next_page_token
    return whole


async def pods(registry: "RegistryAsyncStub", speculator: str) -> list[pb.PodState]:
    """Return all pods by name, without their traffic."""
    request, found = pb.ListPodsRequest(speculator=speculator, page_size=_PODS_PAGE), list[pb.PodState]()
    while True:
        page = await registry.ListPods(request, timeout=TIMEOUT_S)
        found.extend(page.pods)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def newest(registry: "RegistryAsyncStub", speculator: str) -> tuple[pb.SpeculatorState, pb.Version | None]:
    """Return the state of a speculator, and its newest version (without tensors and config), if any."""
    request = pb.ListRequest(speculator=speculator, page_size=1)
    answer = await registry.List(request, timeout=TIMEOUT_S)
    return answer.speculators[0], answer.versions[0] if answer.versions else None


async def version(registry: "RegistryAsyncStub", speculator: str, number: int) -> pb.Version:
    request = pb.GetRequest(speculator=speculator, version=number)
    return (await registry.Get(request, timeout=TIMEOUT_S)).version


async def history(
    registry: "RegistryAsyncStub", speculator: str, number: int = 0, *, limit: int = _HISTORY_LIMIT
) -> list[pb.Transition]:
    """Return the last changes of one version (0: of all), oldest first."""
    request = pb.HistoryRequest(speculator=speculator, version=number, limit=limit)
    response = await registry.History(request, timeout=TIMEOUT_S)
    return list(reversed(response.transitions))


async def resolve(registry: "RegistryAsyncStub", speculator: str, version: int | str) -> int:
    """Return the number of a version named by number or by role; Conflict if no version has the role."""
    if isinstance(version, int):
        return version
    state, _ = await newest(registry, speculator)
    number: int = getattr(state, version)
    if not number:
        raise Conflict(f"{speculator} has no {version} version now")
    return number


def _away(address: str, error: Unavailable) -> str:
    """Name the address that did not answer; messages of the registry or of ours stay unchanged."""
    cause = error.__cause__
    if not isinstance(cause, grpc.aio.AioRpcError):
        return str(error)
    if cause.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the registry at {address} did not answer in time"
    details = cause.details() or ""
    for message, hint in _NO_CONNECTION.items():
        if message in details:
            return f"no connection to the registry at {address}: {hint}" if hint else _nobody(address)
    return details or _nobody(address)


def _nobody(address: str) -> str:
    return f"no registry answers at {address}: start one with `updraft up`, or name another one with --registry"

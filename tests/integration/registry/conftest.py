"""A registry for each test that asks for one: in the test's loop, or as a process where it has to die."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from tests.support.registry import Registry, RegistryProcess, registry_stub, running

from updraft_chassis import rpc

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    async with running(tmp_path) as started:
        yield started


@pytest.fixture
def process(tmp_path: Path) -> Iterator[RegistryProcess]:
    with RegistryProcess(tmp_path) as started:
        yield started


@pytest.fixture
async def channel(registry: Registry) -> AsyncIterator[grpc.aio.Channel]:
    async with rpc.channel(registry.address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> "RegistryAsyncStub":
    return registry_stub(channel)

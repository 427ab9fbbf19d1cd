"""The draft at the shift, unchanged: pulled from the registry and served by a separate process that never swaps."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from updraft_artifacts import transfer
from updraft_chassis.ports import free_port
from updraft_cli.backends import registry_client as registry
from updraft_cli.demo.chat import ChatServer
from updraft_cli.local.plan import SPECULATOR, answers
from updraft_cli.local.ports import HOST
from updraft_cli.local.process import Listener, Process
from updraft_cli.local.supervisor import Supervisor


async def pull(registry_address: str, version: int, folder: Path) -> Path:
    """Copy a version from the registry, verified."""
    async with registry.connected(registry_address) as stub:
        return await transfer.download(stub, SPECULATOR, version, folder)


def frozen_process(serving: Process, draft: Path, data: Path) -> Process:
    """Return a process like the stack's inference process, with a fixed draft, and without registry or capture."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    values = {"PORT": port, "DRAFT_PATH": draft, "REGISTRY_ADDRESS": "", "REDIS_URL": "", "DATA_DIR": data}
    changed = {f"UPDRAFT_INFERENCE_{name}": str(value) for name, value in values.items()}
    return replace(
        serving,
        name="frozen",
        environment={**serving.environment, **changed},
        is_ready=lambda: answers(f"{url}/readyz"),
        address=url,
    )


@asynccontextmanager
async def running(process: Process, *, logs: Path, listener: Listener, like: ChatServer) -> AsyncIterator[ChatServer]:
    """Run the process for the length of the block; yield it as a server like `like`."""
    supervisor = Supervisor([[process]], logs=logs, listener=listener)
    try:
        await asyncio.to_thread(supervisor.start)
        yield replace(like, url=process.address)
    finally:
        await asyncio.to_thread(supervisor.stop)

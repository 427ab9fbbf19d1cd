"""The draft at the shift, unchanged: pulled from the registry and served by a separate process that never swaps."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from updraft_artifacts import transfer
from updraft_chassis.errors import Unavailable
from updraft_chassis.retry import Backoff
from updraft_cli.backends import registry_client as registry
from updraft_cli.demo.chat import ChatServer
from updraft_cli.local.child import Child
from updraft_cli.local.log_file import LogFile
from updraft_cli.local.plan import SPECULATOR, StackConfig, answers
from updraft_cli.local.ports import HOST
from updraft_cli.local.process import Listener, Process, State

_POLL_S = 0.1


async def pull(registry_address: str, version: int, folder: Path) -> Path:
    """Copy a version from the registry, verified."""
    async with registry.connected(registry_address) as stub:
        return await transfer.download(stub, SPECULATOR, version, folder)


def frozen_process(config: StackConfig, draft: Path, data: Path, port: int) -> Process:
    """Return an inference process like the stack's, with a fixed draft, and without registry or capture."""
    url = f"http://{HOST}:{port}"
    values = {
        "MODEL": config.model,
        "SERVED_MODEL_NAME": config.model_name or "",
        "HOST": HOST,
        "PORT": port,
        "NUM_SLOTS": config.slots,
        "NUM_THREADS": config.threads,
        "DRAFT_PATH": draft,
        "REGISTRY_ADDRESS": "",
        "REDIS_URL": "",
        "DATA_DIR": data,
        "LOG_FORMAT": "text",
    }
    environment = {f"UPDRAFT_INFERENCE_{name}": str(value) for name, value in values.items() if value is not None}
    return Process(
        name="frozen",
        command=(sys.executable, "-m", "updraft_inference"),
        environment={**config.settings, **environment, "PYTHONUNBUFFERED": "1"},
        is_ready=lambda: answers(f"{url}/readyz"),
        address=url,
    )


@asynccontextmanager
async def running(process: Process, *, logs: Path, listener: Listener, like: ChatServer) -> AsyncIterator[ChatServer]:
    """Run the process for the length of the block; yield it as a server like `like`."""
    child = Child(process, LogFile(logs / f"{process.name}.log"), listener, Backoff())
    child.start()
    try:
        await _ready(child)
        yield ChatServer(http=like.http, url=process.address, model=like.model)
    finally:
        child.terminate()
        if not await asyncio.to_thread(child.join, process.stop_within_s):
            child.kill()


async def _ready(child: Child) -> None:
    try:
        async with asyncio.timeout(child.process.start_within_s):
            while child.state is not State.READY:  # its thread has no event loop to notify
                if child.state is State.FAILED:
                    raise Unavailable(f"the frozen draft's process {child.reason}; its log is {child.log_path}")
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise Unavailable(f"the frozen draft's process is not ready; its log is {child.log_path}") from None

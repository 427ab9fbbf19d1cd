"""The registry, the trainer and pods as processes whose event loops are watched: `python -m bench.width.processes NAME FILE`.

Each runs its own `serve` function, as its `main` does; only the watch (standstill.py) and, in pods, the engine are added.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.width import standstill
from tests.support.processes import ServerProcess
from tests.support.wait import wait_until

from updraft_chassis import lifecycle, logs, settings
from updraft_draft import memory

Serve = Callable[[lifecycle.Stop], Awaitable[None]]

_NUM_KERNELS = 64


class WatchedProcess(ServerProcess):
    """One of them, with its log and the lines of its watch in `folder`."""

    def __init__(self, name: str, folder: Path, variables: dict[str, str]) -> None:
        super().__init__()
        self.name = name
        self._variables = variables
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path, self._lines = folder / "log", folder / "standstill"

    def start(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UPDRAFT_")}
        command = [sys.executable, "-W", "ignore", "-m", "bench.width.processes", self.name, str(self._lines)]
        with self.log_path.open("ab") as log:
            self._spawn(command, env=inherited | self._variables, stderr=log)

    def wait_for_log(self, text: str, timeout_s: float = 120.0) -> None:
        """Wait until its log contains `text`."""
        wait_until(
            lambda: text in self.log_path.read_text() or not self.is_running,
            timeout_s=timeout_s,
            what=f"{text!r} is logged",
        )
        assert self.is_running, self.log_path.read_text()[-3000:]

    def watched(self, since_s: float) -> list[standstill.Second]:
        return standstill.read(self._lines, since_s)


def main() -> None:
    name, lines = sys.argv[1], Path(sys.argv[2])
    logs.configure(process=name, level="INFO", format="text")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    serve = {"registry": _registry, "trainer": _trainer, "pod": _pod, "control": _control}[name]()

    async def watched(stop: lifecycle.Stop) -> None:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(standstill.record(lines))
            await serve(stop)
            watching.cancel()

    lifecycle.run(f"updraft-{name}", watched)


def _registry() -> Serve:
    from updraft_registry import process  # noqa: PLC0415 - each process imports its own service
    from updraft_registry.settings import RegistrySettings  # noqa: PLC0415

    config = settings.load(RegistrySettings)
    return lambda stop: process.serve(config, stop)


def _trainer() -> Serve:
    memory.limit(os.environ, num_kernels=_NUM_KERNELS)  # as its main does
    memory.use_huge_pages(os.environ)
    import torch  # noqa: PLC0415
    from bench.width import trainer  # noqa: PLC0415

    from updraft_trainer.settings import TrainerSettings  # noqa: PLC0415

    config = settings.load(TrainerSettings)
    os.nice(config.niceness)
    torch.set_num_threads(config.num_threads)
    return lambda stop: trainer.serve(config, stop)


def _pod() -> Serve:
    memory.limit(os.environ, num_kernels=_NUM_KERNELS)  # as the main of an agent beside a server does
    memory.return_large_blocks(os.environ)
    from bench.width import pod  # noqa: PLC0415

    return pod.serve_until


def _control() -> Serve:
    from bench.width import control  # noqa: PLC0415

    return control.serve


if __name__ == "__main__":
    main()

"""All processes of local mode on one data folder: claim it, plan, run, and note what runs.

Independent of a terminal: `updraft up` listens and waits for Ctrl-C; the demo and the tests use it directly.
"""

import os
import threading
from contextlib import ExitStack, suppress
from importlib.metadata import version
from typing import Self

import psutil

from updraft_chassis.errors import Unavailable
from updraft_cli.local import plan
from updraft_cli.local.child import Child
from updraft_cli.local.data_folder import DataFolder, StackState
from updraft_cli.local.plan import Addresses, StackConfig
from updraft_cli.local.process import Changed, Event, Listener, ProcessState
from updraft_cli.local.supervisor import Supervisor


class Stack:
    """Redis, registry, trainer and inference, from `__enter__` (returns when all are ready) to `__exit__`.

    Raises, with one sentence and nothing left running: Conflict (folder in use, port taken), InvalidInput
    (no model folder, wrong setting), NotFound (no Redis server), Unavailable (a process does not start; its
    last lines). A data folder that was used before continues where it was.
    """

    def __init__(self, config: StackConfig, *, listener: Listener = lambda _: None) -> None:
        self.config = config
        self.folder = DataFolder(config.data)
        self._listener = listener
        self._exit = ExitStack()
        self._writing = threading.Lock()
        self._supervisor = Supervisor([], logs=self.folder.logs, listener=self._on_event)
        self.addresses: Addresses
        """Known once the stack starts."""

    def __enter__(self) -> Self:
        plan.check(self.config, os.environ)
        with ExitStack() as starting:
            starting.enter_context(self.folder.hold())
            self.addresses = plan.addresses(self.config, self.folder)
            if self.config.redis_url and not plan.is_redis_ready(self.config.redis_url):
                raise Unavailable("no Redis answers at the address of --redis-url; start it, or leave the option out")
            size = plan.stream_bytes(self.config, os.environ)
            stages = plan.stages(self.config, self.addresses, self.folder, os.environ, stream_bytes=size)
            self._supervisor = Supervisor(stages, logs=self.folder.logs, listener=self._on_event)
            starting.enter_context(self._supervisor)
            self._exit = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    @property
    def children(self) -> list[Child]:
        """The processes; empty before the start."""
        return self._supervisor.children

    def child(self, name: str) -> Child:
        return self._supervisor.child(name)

    def crash(self, name: str) -> None:
        """Kill a process as a crash would, and return when it is ready again."""
        self._supervisor.crash(name)

    def kill(self) -> None:
        """End every process at once; `__exit__` then returns soon."""
        self._supervisor.kill()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Changed):
            self._note()
        self._listener(event)

    def _note(self) -> None:
        # On a full disk the note is stale and the processes continue; the logs record the gap.
        with self._writing, suppress(OSError):
            self.folder.write_state(self._state())

    def _state(self) -> StackState:
        where = self.addresses
        processes = tuple(
            ProcessState(
                name=child.process.name,
                state=child.state,
                pid=child.pid,
                restarts=child.num_restarts,
                address=child.process.address,
                log=str(child.log_path),
            )
            for child in self.children
        )
        return StackState(
            pid=os.getpid(),
            created_unix_s=psutil.Process().create_time(),
            updraft_version=version("updraft"),
            model=str(self.config.model),
            speculator=plan.SPECULATOR,
            inference_url=where.inference_url,
            registry_address=where.registry,
            redis_url=where.redis_url,
            metrics_urls=where.metrics_urls,
            processes=processes,
        )

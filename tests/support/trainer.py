"""A trainer as a process of its own, and what can be seen of its work: its log, its metrics, its replay, its streams."""

import re
import sqlite3
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tests.support.ports import free_port
from tests.support.processes import Process, scrape

from updraft_chassis import streams
from updraft_trainer.data.replay import INDEX

FAST = {
    "UPDRAFT_TRAINER_DRAFT_VOCAB_SIZE": "512",
    "UPDRAFT_TRAINER_LEARNING_RATE": "0.003",
    "UPDRAFT_TRAINER_ADAPTATION_RATE": "0.003",
    "UPDRAFT_TRAINER_EVALUATE_SECONDS": "2",
    "UPDRAFT_TRAINER_CHECKPOINT_SECONDS": "2",
    "UPDRAFT_TRAINER_MAX_USES": "50",
    "UPDRAFT_TRAINER_NICENESS": "0",  # the test waits for it, and shares its cores with who knows what
}
"""Variables with which the whole loop learns a tiny target in seconds, for which a real one needs minutes."""


class Trainer(Process):
    """A real trainer that estimates and saves often. Keywords in capitals are its variables without their prefix.

    `command`: the module that is run and its arguments. `metrics_port`: None for any.
    """

    def __init__(
        self,
        folder: Path,
        target: Path,
        redis_url: str,
        registry_port: int,
        *,
        command: Sequence[str] = ("updraft_trainer",),
        metrics_port: int | None = None,
        **changed: str,
    ) -> None:
        self.metrics_port = metrics_port or free_port()
        self.data_dir = folder / "trainer"
        variables = {
            "MODEL": str(target),
            "DATA_DIR": str(self.data_dir),
            "REDIS_URL": redis_url,
            "REGISTRY_ADDRESS": f"127.0.0.1:{registry_port}",
            "POD_NAME": "trainer-0",
            "METRICS_PORT": str(self.metrics_port),
            "DRAFT_VOCAB_SIZE": "128",
            "EVALUATE_SECONDS": "0.5",
            "CHECKPOINT_SECONDS": "0.2",
            "MAX_USES": "1000",  # there is always something to learn
            "NICENESS": "0",  # the test waits for it, and shares its cores with who knows what
            "LOG_FORMAT": "text",
        }
        prefixed = {f"UPDRAFT_TRAINER_{name}": value for name, value in (variables | changed).items()}
        module, *arguments = command
        super().__init__(module, prefixed, folder / f"trainer-{uuid.uuid4().hex[:6]}.log", arguments)

    def metric(self, name: str, rank: int = 0) -> float:
        """The value now, by the name without its prefix; 0 if there is none."""
        return scrape(self.metrics_port + rank).get(f"updraft_trainer_{name}", 0.0)


def steps(log: str, event: str) -> list[int]:
    """The optimizer steps that a text log says with an event."""
    return [int(step) for step in re.findall(rf"{event}  step=(\d+)", log)]


def admissions(data_dir: Path) -> list[str]:
    """Trace ids in the order of their admission, as the file has them."""
    index = data_dir / "replay" / INDEX
    if not index.exists():
        return []
    with closing(sqlite3.connect(index)) as db:
        try:
            return [trace_id for (trace_id,) in db.execute("SELECT trace_id FROM seen ORDER BY admitted")]
        except sqlite3.OperationalError:  # killed before it made its tables
            return []


async def is_settled(client: streams.Client, *keys: str) -> bool:
    """Whether these streams are empty and nobody holds anything of them."""
    for key in keys:
        if not await client.exists(key):
            return False
        groups = await client.xinfo_groups(key)
        if await client.xlen(key) or not groups or any(group["pending"] for group in groups):
            return False
    return True

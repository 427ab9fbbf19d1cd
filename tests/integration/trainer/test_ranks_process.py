"""A trainer of two ranks under torchrun, with a real Redis and a real registry."""

import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from tests.support.ports import free_port
from tests.support.processes import Process, scrape
from tests.support.traces import TraceMaker
from tests.support.wait import until

from updraft_chassis import streams

pytestmark = pytest.mark.lasts(120)

NUM_RANKS = 2

KEYS = streams.keys("default", "default", NUM_RANKS)


class Ranks(Process):
    """`torchrun -m updraft_trainer`, which estimates and saves often."""

    def __init__(self, folder: Path, target: Path, redis_url: str, registry_port: int, **changed: str) -> None:
        self.metrics_port = two_free_ports()
        self.data_dir = folder / "trainer"
        variables = {
            "MODEL": str(target),
            "DATA_DIR": str(self.data_dir),
            "REDIS_URL": redis_url,
            "STREAM_SHARDS": str(NUM_RANKS),
            "REGISTRY_ADDRESS": f"127.0.0.1:{registry_port}",
            "POD_NAME": "trainer-0",
            "METRICS_PORT": str(self.metrics_port),
            "DRAFT_VOCAB_SIZE": "128",
            "EVALUATE_SECONDS": "0.5",
            "CHECKPOINT_SECONDS": "0.2",
            "MAX_USES": "1000",  # there is always something to learn
            "NICENESS": "0",
            "LOG_FORMAT": "text",
        }
        prefixed = {f"UPDRAFT_TRAINER_{name}": value for name, value in (variables | changed).items()}
        options = ["--standalone", "--nproc-per-node", str(NUM_RANKS), "--max-restarts", "3", "-m", "updraft_trainer"]
        log = folder / f"trainer-{uuid.uuid4().hex[:6]}.log"
        super().__init__("torch.distributed.run", prefixed, log, options)

    def metric(self, name: str, rank: int = 0) -> float:
        return scrape(self.metrics_port + rank).get(f"updraft_trainer_{name}", 0.0)

    def pid_of(self, rank: int) -> int:
        ranks = {child.environ()["RANK"]: child.pid for child in psutil.Process(self.pid).children()}
        return ranks[str(rank)]

    def kill_rank(self, rank: int) -> None:
        psutil.Process(self.pid_of(rank)).send_signal(signal.SIGKILL)

    def __exit__(self, *raised: object) -> None:
        children = psutil.Process(self.pid).children() if self.is_running else []
        super().__exit__(None, None, None)
        for child in children:
            child.kill()


def two_free_ports() -> int:
    """The first of two in a row."""
    while True:
        port = free_port()
        if port < 65535 and not scrape(port + 1):
            return port


@pytest.fixture
def registry_port(tmp_path: Path) -> Iterator[int]:
    port = free_port()
    variables = {
        "UPDRAFT_REGISTRY_DATA_DIR": str(tmp_path / "registry"),
        "UPDRAFT_REGISTRY_PORT": str(port),
        "UPDRAFT_REGISTRY_METRICS_PORT": "0",
        "UPDRAFT_REGISTRY_STRATEGY": "Immediate",
    }
    with Process("updraft_registry", variables, tmp_path / "registry.log") as process:
        process.wait_for_log("Registry serves")
        yield port


async def send(client: Redis, traces: TraceMaker, start: int, end: int, *, rule: int = 0) -> None:
    producer = streams.ShardedProducer(client, KEYS, max_bytes=64 * 1024**2)
    for seed in range(start, end):
        trace = traces.trace(seed, rule=rule, evaluation=seed % 4 == 0)
        await producer.append(trace.header.trace_id, trace.SerializeToString())


async def is_settled(client: Redis) -> bool:
    for key in KEYS:
        groups = await client.xinfo_groups(key)
        if await client.xlen(key) or not groups or any(group["pending"] for group in groups):
            return False
    return True


async def test_two_ranks_learn_publish_lose_one_go_on_and_publish_again(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    await send(redis, traces, 0, 80)
    with Ranks(tmp_path, tiny_target, redis_url, registry_port) as trainer:
        await until(
            lambda: trainer.metric('publishes_total{outcome="stable"}') > 0, timeout_s=120, what="the first version"
        )
        await until(lambda: trainer.metric("optimizer_steps_total", 1) > 10, what="training at both ranks")
        await until(lambda: "Saved" in trainer.log(), what="a save")
        served = trainer.metric("serving_version")
        trainer.kill_rank(1)
        await send(redis, traces, 1000, 1080, rule=1)
        await until(lambda: trainer.log().count("Trainer started") == 2 * NUM_RANKS, what="the second life")
        await until(
            lambda: trainer.metric("serving_version") > served, timeout_s=120, what="another version"
        )
        await until(lambda: is_settled(redis), what="empty streams")
        assert trainer.metric("optimizer_steps_total", 1) > 0
        trainer.terminate()
    assert len(re.findall(r"Resumed  step=[1-9]", trainer.log())) == 1

"""A trainer of two ranks under torchrun, with a real Redis and a real registry."""

import re
import signal
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest
from redis.asyncio import Redis
from tests.support.ports import free_port
from tests.support.processes import scrape
from tests.support.ranks import environment
from tests.support.redis_server import RedisServer
from tests.support.traces import TraceMaker
from tests.support.trainer import Trainer, admissions, is_settled, steps
from tests.support.wait import LONG_S, until
from torch._C._distributed_c10d import TCPStore

from updraft.registry.v1 import registry_pb2, registry_pb2_grpc
from updraft_chassis import rpc, streams
from updraft_trainer.states.state import Identity, States

pytestmark = pytest.mark.lasts(120)

NUM_RANKS = 2

KEYS = streams.keys("default", "default", NUM_RANKS)


class Ranks(Trainer):
    """`torchrun -m updraft_trainer`."""

    def __init__(
        self, folder: Path, target: Path, redis_url: str, registry_port: int, num_restarts: int = 3, **changed: str
    ) -> None:
        options = ["--standalone", "--nproc-per-node", str(NUM_RANKS), "--max-restarts", str(num_restarts)]
        super().__init__(
            folder,
            target,
            redis_url,
            registry_port,
            command=("torch.distributed.run", *options, "-m", "updraft_trainer"),
            metrics_port=two_free_ports(),
            **({"STREAM_SHARDS": str(NUM_RANKS)} | changed),
        )

    def pid_of(self, rank: int) -> int:
        ranks = {child.environ()["RANK"]: child.pid for child in psutil.Process(self.pid).children()}
        return ranks[str(rank)]

    def kill_rank(self, rank: int) -> None:
        psutil.Process(self.pid_of(rank)).send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """As Kubernetes does. torchrun itself then always ends with a traceback and status 1."""
        assert self.terminate() == 1

    def __exit__(self, *raised: object) -> None:
        ranks = psutil.Process(self.pid).children() if self.is_running else []
        super().__exit__(None, None, None)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()


def readiness(port: int) -> int:
    """The status of /readyz; 0 while nothing answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=LONG_S) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


def two_free_ports() -> int:
    """The first of two in a row."""
    while True:
        port = free_port()
        if port < 65535 and not scrape(port + 1):
            return port


async def send(client: Redis, traces: TraceMaker, start: int, end: int, *, rule: int = 0) -> set[str]:
    """Send traces, each to its shard; return their ids."""
    producer = streams.ShardedProducer(client, KEYS, max_bytes=64 * 1024**2)
    ids = set()
    for seed in range(start, end):
        trace = traces.trace(seed, rule=rule, evaluation=seed % 4 == 0)
        await producer.append(trace.header.trace_id, trace.SerializeToString())
        ids.add(trace.header.trace_id.hex())
    return ids


async def training_on_everything(trainer: Ranks, client: Redis) -> None:
    """Wait until both ranks train, and nothing is left to read: a rank that stops leaves what it just read to its next life."""
    await until(lambda: trainer.metric("optimizer_steps_total", 1) > 10, timeout_s=120, what="training")
    await until(lambda: is_settled(client, *KEYS), what="empty streams")


async def test_two_ranks_learn_publish_lose_one_go_on_and_publish_again_without_losing_a_trace(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    sent = await send(redis, traces, 0, 80)
    with Ranks(tmp_path, tiny_target, redis_url, registry_port) as trainer:
        await until(
            lambda: trainer.metric('publishes_total{outcome="stable"}') > 0, timeout_s=120, what="the first version"
        )
        await until(lambda: trainer.metric("optimizer_steps_total", 1) > 10, what="training at both ranks")
        await until(lambda: max(steps(trainer.log(), "Saved"), default=0) > 0, what="a save")
        served = trainer.metric("serving_version")
        trainer.kill_rank(1)
        sent |= await send(redis, traces, 1000, 1080, rule=1)
        await until(lambda: trainer.log().count("Trainer started") == 2 * NUM_RANKS, what="the second life")
        await until(lambda: trainer.metric("serving_version") > served, timeout_s=120, what="another version")
        await until(lambda: is_settled(redis, *KEYS), what="empty streams")
        await until(lambda: trainer.metric("optimizer_steps_total", 1) > 0, what="training at both ranks again")
        trainer.stop()
    assert len(steps(trainer.log(), "Resumed")) == 1
    stored = [admissions(folder) for folder in (trainer.data_dir, trainer.data_dir / "rank-1")]
    assert all(len(ids) > 40 for ids in stored)
    assert sorted([*stored[0], *stored[1]]) == sorted(sent)
    assert "Traceback" not in "\n".join(line for line in trainer.log().splitlines() if " trainer: " in line)


async def test_a_first_draft_comes_from_the_requests_of_both_ranks(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    sent = await send(redis, traces, 0, 12)
    with Ranks(tmp_path, tiny_target, redis_url, registry_port) as trainer:
        await until(lambda: trainer.metric("optimizer_steps_total", 1) > 0, timeout_s=120, what="training")
        await until(lambda: is_settled(redis, *KEYS), what="empty streams")
        trainer.stop()
    stored = [admissions(folder) for folder in (trainer.data_dir, trainer.data_dir / "rank-1")]
    assert sorted([*stored[0], *stored[1]]) == sorted(sent)
    assert len(stored[0]) < 8, "rank 0 alone has had too few"


async def test_a_stop_of_torchrun_ends_all_ranks_with_a_save_from_which_one_process_goes_on(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    await send(redis, traces, 0, 80)
    with Ranks(tmp_path, tiny_target, redis_url, registry_port, CHECKPOINT_SECONDS="3600", SHARDING="shard") as trainer:
        await training_on_everything(trainer, redis)
        trainer.stop()
    assert steps(trainer.log(), "Saved")[-1] > 10
    assert trainer.log().count("is stopping") == NUM_RANKS
    assert "CRITICAL" not in trainer.log()
    with Trainer(tmp_path, tiny_target, redis_url, registry_port, STREAM_SHARDS=str(NUM_RANKS)) as alone:
        await until(lambda: alone.metric("optimizer_steps_total") > 0, timeout_s=120, what="training of one process")
        assert alone.terminate() == 0
    assert steps(alone.log(), "Resumed") == [steps(trainer.log(), "Saved")[-1]]


async def test_a_rank_that_alone_is_told_to_stop_ends_all_ranks_with_a_save(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    await send(redis, traces, 0, 80)
    with Ranks(tmp_path, tiny_target, redis_url, registry_port, CHECKPOINT_SECONDS="3600") as trainer:
        await training_on_everything(trainer, redis)
        psutil.Process(trainer.pid_of(1)).terminate()
        assert trainer.wait() == 0
    assert steps(trainer.log(), "Saved")[-1] > 10


async def test_a_rank_without_samples_does_not_stop_the_others(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    producer = streams.Producer(redis, KEYS[0], max_bytes=64 * 1024**2)
    for seed in range(80):
        await producer.append(traces.data(seed, evaluation=seed % 4 == 0))
    with Ranks(tmp_path, tiny_target, redis_url, registry_port) as trainer:
        await until(
            lambda: trainer.metric('publishes_total{outcome="stable"}') > 0, timeout_s=120, what="the first version"
        )
        await until(lambda: trainer.metric("optimizer_steps_total", 1) > 10, what="steps of the rank without samples")
        assert trainer.metric('replay_samples{place="window"}', 1) == 0
        await until(lambda: trainer.metric("demand_tokens_per_second") > 0, what="the demand of both")
        await until(lambda: is_settled(redis, KEYS[0]), what="an empty stream")
        trainer.stop()


async def test_a_rank_that_hangs_is_named_and_training_goes_on_when_it_does(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    sentence = (
        r"Training stalls: rank 0 has been busy with .* for [1-9]\d s, and waits for rank 1, which has not been heard of for"
        r" [1-9]\d s"
    )
    await send(redis, traces, 0, 80)
    with Ranks(tmp_path, tiny_target, redis_url, registry_port, STALL_SECONDS="12") as trainer:
        await training_on_everything(trainer, redis)
        hanging = psutil.Process(trainer.pid_of(1))
        hanging.suspend()
        await until(lambda: re.search(sentence, trainer.log()) is not None, what="a line about the stall")
        hanging.resume()
        before = trainer.metric("optimizer_steps_total")
        await until(lambda: trainer.metric("optimizer_steps_total") > before + 10, what="more training")
        trainer.stop()


async def test_a_rank_0_that_hangs_is_named_by_another_rank(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    sentence = r"Training stalls: rank 1 .* waits for rank 0, which has not been heard of for [1-9]\d s"
    await send(redis, traces, 0, 80)
    with Ranks(tmp_path, tiny_target, redis_url, registry_port, STALL_SECONDS="12", MAX_USES="1") as trainer:
        await until(lambda: trainer.metric("optimizer_steps_total", 1) > 0, timeout_s=120, what="training")
        await until(lambda: is_settled(redis, *KEYS), what="empty streams")
        hanging = psutil.Process(trainer.pid_of(0))
        hanging.suspend()
        await until(lambda: re.search(sentence, trainer.log()) is not None, what="a line about the stall")
        hanging.resume()
        trainer.stop()


async def test_a_rank_that_is_told_to_stop_before_the_first_draft_ends_all_ranks(
    redis_url: str, tmp_path: Path, tiny_target: Path, registry_port: int
) -> None:
    with Ranks(tmp_path, tiny_target, redis_url, registry_port) as trainer:
        await until(lambda: trainer.metric("registry_up") == 1, timeout_s=120, what="rank 0's wait for traces")
        psutil.Process(trainer.pid_of(1)).terminate()
        assert trainer.wait() == 0


async def test_training_goes_on_while_redis_is_away_and_what_it_held_is_read_later(
    short_tmp_path: Path, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    with RedisServer(short_tmp_path, durable=True) as server:
        async with streams.connect(server.url) as client:
            assert isinstance(client, Redis)
            sent = await send(client, traces, 0, 80)
        with Ranks(tmp_path, tiny_target, server.url, registry_port, LEASE_SECONDS="2") as trainer:
            await until(lambda: trainer.metric("optimizer_steps_total", 1) > 10, timeout_s=120, what="training")
            server.kill()
            await until(lambda: trainer.metric("leads") == 0, what="the end of the lease")
            before = trainer.metric("optimizer_steps_total", 1)
            await until(lambda: trainer.metric("optimizer_steps_total", 1) > before + 10, what="training without Redis")
            server.start()
            await until(lambda: trainer.metric("leads") == 1, what="the lease again")
            async with streams.connect(server.url) as client:
                assert isinstance(client, Redis)
                sent |= await send(client, traces, 1000, 1040)
                await until(lambda: is_settled(client, *KEYS), what="empty streams")
            trainer.stop()
        stored = [admissions(folder) for folder in (trainer.data_dir, trainer.data_dir / "rank-1")]
        assert sorted([*stored[0], *stored[1]]) == sorted(sent)


async def test_a_rank_is_not_ready_before_the_others_have_come(
    redis_url: str, tmp_path: Path, tiny_target: Path, registry_port: int
) -> None:
    store, port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), two_free_ports()
    num_keys = store.num_keys()
    one, other = (
        Trainer(tmp_path, tiny_target, redis_url, registry_port, metrics_port=port, STREAM_SHARDS=str(NUM_RANKS))
        for _ in range(NUM_RANKS)
    )
    for rank, trainer in enumerate((one, other)):
        started = environment(rank, NUM_RANKS, store.port) | {"LOCAL_WORLD_SIZE": str(NUM_RANKS)}
        trainer.variables = {**trainer.variables, **started}
    with other:
        await until(lambda: store.num_keys() > num_keys, timeout_s=120, what="a rank that waits")
        assert readiness(port + 1) == 503
        assert other.metric('activity{activity="join"}', 1) == 1
        with one:
            await until(lambda: readiness(port) == readiness(port + 1) == 200, timeout_s=120, what="both ranks")
            await until(lambda: one.metric('activity{activity="idle"}', 1) == 1, what="a rank that waits for traffic")


def test_fewer_shards_than_ranks_are_refused_in_one_sentence(
    redis_url: str, tmp_path: Path, tiny_target: Path, registry_port: int
) -> None:
    with Ranks(tmp_path, tiny_target, redis_url, registry_port, num_restarts=0, STREAM_SHARDS="1") as trainer:
        assert trainer.wait() == 1
    assert (
        "updraft-trainer: UPDRAFT_TRAINER_STREAM_SHARDS is 1, but each of 2 ranks needs a stream of its own: set it, and"
        " UPDRAFT_INFERENCE_STREAM_SHARDS of the pods, to 2 or more"
    ) in trainer.log().splitlines()


async def test_a_tenant_is_forgotten_by_all_ranks_and_the_draft_is_known_to_have_learned_from_those_of_all(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    producer = streams.ShardedProducer(redis, KEYS, max_bytes=64 * 1024**2)
    traces_of: list[int] = [0, 0]
    for seed in range(60):
        trace = traces.trace(seed, evaluation=seed % 4 == 0)
        shard = streams.shard_of(trace.header.trace_id, NUM_RANKS)
        trace.header.tenant_hash = shard + 1  # a tenant of its own at each rank
        traces_of[shard] += 1
        await producer.append(trace.header.trace_id, trace.SerializeToString())
    with Ranks(tmp_path, tiny_target, redis_url, registry_port) as trainer:
        await training_on_everything(trainer, redis)
        await until(lambda: trainer.metric('publishes_total{outcome="stable"}') > 0, what="a version")
        async with rpc.channel(f"127.0.0.1:{registry_port}") as channel:
            stub = registry_pb2_grpc.RegistryStub(channel)
            for tenant in (1, 2):
                forget = registry_pb2.ForgetTenantRequest(speculator="default", hash=tenant)
                await stub.ForgetTenant(forget, timeout=LONG_S)

            async def are_deleted() -> bool:
                listed = await stub.ListTenants(registry_pb2.ListTenantsRequest(speculator="default"), timeout=LONG_S)
                return all(one.is_deleted for one in listed.tenants)

            await until(are_deleted, what="the word of all ranks")
        deleted = [trainer.metric('traces_deleted_total{reason="forgotten"}', rank) for rank in range(NUM_RANKS)]
        assert deleted == traces_of
        trainer.stop()
    identity = Identity(
        speculator="default",
        target_fingerprint=traces.target_fingerprint,
        tokenizer_fingerprint=traces.tokenizer_fingerprint,
    )
    state = States(trainer.data_dir / "states").load(identity)
    assert state is not None
    assert state.history.tenants == [f"{tenant:016x}" for tenant in (1, 2)], "later versions list those of both ranks"

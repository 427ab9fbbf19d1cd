import os
import random
import re
import resource
import subprocess
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis
from tests.support.ports import free_port
from tests.support.tiny_target import make_tiny_target
from tests.support.traces import TraceMaker
from tests.support.trainer import Trainer, admissions, is_settled, steps
from tests.support.wait import LONG_S, until

from updraft.registry.v1 import registry_pb2, registry_pb2_grpc
from updraft_chassis import rpc, streams
from updraft_chassis.tenants import hashes

pytestmark = pytest.mark.lasts(80)

KEY = "updraft:{default:default:0}:samples:v1"


async def send(client: Redis, traces: TraceMaker, start: int, end: int) -> None:
    producer = streams.Producer(client, KEY, max_bytes=64 * 1024**2)
    for seed in range(start, end):
        await producer.append(traces.data(seed, evaluation=seed % 4 == 0))


async def test_a_trainer_killed_at_any_moment_loses_no_trace_admits_none_twice_and_goes_on_from_its_last_save(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    rng = random.Random(0)
    trainer = Trainer(tmp_path, tiny_target, redis_url, registry_port)
    moments: dict[str, Callable[[int, int], bool]] = {
        "while it starts": lambda _sent, _saved: True,
        "while it stores": lambda sent, _saved: len(admissions(trainer.data_dir)) > sent + rng.randrange(40),
        "after it saved a step": lambda _sent, saved: max(steps(trainer.log(), "Saved")[saved:], default=0) > 0,
        "while it saves": lambda _sent, _saved: (trainer.data_dir / "states" / "state.part").exists(),
    }
    with trainer:
        for part, moment in enumerate([*moments, *rng.sample([*moments], 2)]):
            num_saved = len(steps(trainer.log(), "Saved"))
            await send(redis, traces, part * 50, part * 50 + 50)
            has_come = partial(moments[moment], part * 50, num_saved)
            await until(has_come, timeout_s=120, what=f"the moment {moment}")
            trainer.kill()
            num_lives = trainer.log().count("Trainer started")
            trainer.start()
        await until(lambda: trainer.log().count("Trainer started") > num_lives, what="the last life")
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
        assert trainer.terminate() == 0
    admitted = admissions(trainer.data_dir)
    assert len(admitted) == len(set(admitted))
    assert set(admitted) == {traces.trace(n, evaluation=n % 4 == 0).header.trace_id.hex() for n in range(300)}
    milestones = re.findall(r"(Saved|Resumed)  step=(\d+)", trainer.log())
    resumptions = [(int(before), int(step)) for (_, before), (what, step) in pairwise(milestones) if what == "Resumed"]
    assert len(resumptions) >= 3
    assert all(
        step >= before for before, step in resumptions
    )  # 0: a first draft is published and saved before any step
    assert max(before for before, _ in resumptions) > 0


async def test_a_draft_learnt_from_the_stream_is_published_and_a_stop_saves_it(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    await send(redis, traces, 0, 80)
    trainer = Trainer(tmp_path, tiny_target, redis_url, registry_port, CHECKPOINT_SECONDS="3600")
    with trainer:
        await until(
            lambda: trainer.metric('publishes_total{outcome="stable"}') > 0,
            timeout_s=120,
            what="the first version",
        )
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
        await until(lambda: trainer.metric("optimizer_steps_total") > 10, what="training after the closed form")
        assert trainer.metric("serving_version") >= 1
        assert trainer.metric('acceptance_length_tokens{role="candidate"}') > 1.15
        assert trainer.metric('replay_samples{place="window"}') == 60
        assert trainer.metric('replay_samples{place="evaluation"}') == 20
        assert trainer.terminate() == 0
    assert steps(trainer.log(), "Saved")[-1] > 10
    assert "Traceback" not in trainer.log()


async def test_a_trainer_with_a_discard_weight_learns_rows_after_rejections_and_publishes(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    for seed in range(60):
        is_held_out = seed % 4 == 0
        await producer.append(traces.data(seed, evaluation=is_held_out, counterfactual_rows=0 if is_held_out else 2))
    trainer = Trainer(tmp_path, tiny_target, redis_url, registry_port, DISCARD_WEIGHT="0.5")
    with trainer:
        await until(lambda: trainer.metric('publishes_total{outcome="stable"}') > 0, what="the first version")
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
        assert trainer.metric('samples_admitted_total{split="train"}') == 45
        assert trainer.metric("optimizer_steps_skipped_total") == 0
        assert trainer.metric('acceptance_length_tokens{role="candidate"}') > 1.15
        assert trainer.terminate() == 0
    assert "Traceback" not in trainer.log()


async def test_a_disk_that_is_full_at_the_stop_costs_what_was_learnt_since_the_last_save_and_no_more(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    await send(redis, traces, 0, 40)
    trainer = Trainer(tmp_path, tiny_target, redis_url, registry_port)
    with trainer:
        trainer.wait_for_log("Saved")
        # Less than a state, more than its log: the process must be able to tell what is wrong.
        resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        trainer.wait_for_log("Could not save, trying again later: cannot save to ")
        assert trainer.terminate() == 0
    saved = steps(trainer.log(), "Saved")[-1]
    (message,) = (line for line in trainer.log().splitlines() if "Could not save, the next start resumes" in line)
    assert "ERROR" in message
    assert "from the last saved state: cannot save to" in message
    assert f"saved_step={saved}" in message
    assert "Traceback" not in trainer.log()
    with trainer:
        trainer.wait_for_log("Resumed")
        assert steps(trainer.log(), "Resumed") == [saved]
        await until(lambda: is_settled(redis, KEY), what="an empty stream")


def test_a_trainer_with_nothing_to_learn_burns_no_processor_time(
    redis_url: str, tmp_path: Path, tiny_target: Path, registry_port: int
) -> None:
    trainer = Trainer(tmp_path, tiny_target, redis_url, registry_port, FIRST_SAMPLES="0", NICENESS="10")
    with trainer:
        trainer.wait_for_log("Started a new draft")
        process = psutil.Process(trainer.pid)
        assert process.nice() == min(19, os.nice(0) + 10)
        before = process.cpu_times()
        with pytest.raises(subprocess.TimeoutExpired):
            trainer.wait(timeout_s=3.0)
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.5


def test_a_state_of_another_target_ends_the_start_in_one_sentence(
    redis_url: str, tmp_path: Path, tiny_target: Path, registry_port: int
) -> None:
    trainer = Trainer(tmp_path, tiny_target, redis_url, registry_port, FIRST_SAMPLES="0")
    with trainer:
        trainer.wait_for_log("Started a new draft")
        assert trainer.terminate() == 0
    stranger = make_tiny_target(tmp_path / "stranger", seed=9)
    other = Trainer(tmp_path, stranger, redis_url, registry_port)
    with other:
        assert other.wait() == 1
    assert "has the target fingerprint sha256:" in other.log()
    assert "set UPDRAFT_TRAINER_DATA_DIR to another folder" in other.log()
    assert "Traceback" not in other.log()


def test_two_trainers_do_not_share_a_folder(
    redis_url: str, tmp_path: Path, tiny_target: Path, registry_port: int
) -> None:
    with Trainer(tmp_path, tiny_target, redis_url, registry_port) as first:
        first.wait_for_log("Trainer started")
        with Trainer(tmp_path, tiny_target, redis_url, registry_port) as second:
            assert second.wait() == 1
    assert second.log().splitlines() == [
        f"updraft-trainer: another trainer uses {first.data_dir}; stop it or set UPDRAFT_TRAINER_DATA_DIR to another folder"
    ]


async def test_a_second_trainer_waits_until_the_first_ends_and_says_why(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    await send(redis, traces, 0, 40)
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    first = Trainer(tmp_path, tiny_target, redis_url, registry_port)
    second = Trainer(other_folder, tiny_target, redis_url, registry_port, POD_NAME="trainer-1")
    with first:
        await until(lambda: first.metric("leads") == 1, what="the lease")
        with second:
            second.wait_for_log("which does the same work")
            await until(lambda: is_settled(redis, KEY), what="an empty stream")
            assert admissions(second.data_dir) == []
            assert second.metric("leads") == 0
            assert first.terminate() == 0
            await until(lambda: second.metric("leads") == 1, what="the lease of the second")
            await until(lambda: second.metric("registry_up") == 1, what="its work")
            assert second.terminate() == 0
    (line,) = (line for line in second.log().splitlines() if "which does the same work" in line)
    assert re.search(r"the trainer trainer-1 \(\w+\) waits until the trainer trainer-0 \(\w+\) ends", line)


async def test_a_trainer_that_was_paused_is_succeeded_and_does_not_publish_any_more(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    paused = Trainer(tmp_path, tiny_target, redis_url, registry_port, LEASE_SECONDS="5")
    second = Trainer(other_folder, tiny_target, redis_url, registry_port, POD_NAME="trainer-1", LEASE_SECONDS="5")
    with paused, second:
        await until(lambda: 1 in (paused.metric("leads"), second.metric("leads")), what="a holder")
        if second.metric("leads"):
            paused, second = second, paused
        paused.pause()
        await until(lambda: second.metric("leads") == 1, what="a successor")
        paused.resume()
        assert paused.wait() == 1
        await send(redis, traces, 0, 40)
        await until(lambda: second.metric('publishes_total{outcome="stable"}') > 0, timeout_s=120, what="a version")
        await until(lambda: is_settled(redis, KEY), what="an empty stream")
        assert second.terminate() == 0
    assert "whose lease had run out" in paused.log()
    assert "Published" not in paused.log()
    assert "Traceback" not in paused.log()


async def test_traces_that_nobody_reads_are_named(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    keys = streams.keys("default", "default", 3)
    await streams.Producer(redis, keys[2], max_bytes=2**20).append(traces.data(0))
    with Trainer(tmp_path, tiny_target, redis_url, registry_port) as trainer:
        trainer.wait_for_log("Nobody reads the traces of shard 2: set UPDRAFT_TRAINER_STREAM_SHARDS to the pods'")
        assert trainer.terminate() == 0


def test_a_trainer_lives_without_redis_and_registry(tmp_path: Path, tiny_target: Path) -> None:
    with Trainer(tmp_path, tiny_target, f"redis://127.0.0.1:{free_port()}", free_port()) as trainer:
        trainer.wait_for_log("Cannot read or store traces")
        trainer.wait_for_log("The registry is unavailable")
        assert trainer.terminate() == 0


async def learning_at(registry_port: int) -> registry_pb2.Learning:
    """The trainer's last report; empty before the first."""
    async with rpc.channel(f"127.0.0.1:{registry_port}") as channel:
        answer = await registry_pb2_grpc.RegistryStub(channel).List(registry_pb2.ListRequest(), timeout=LONG_S)
    return next((one.learning for one in answer.speculators), registry_pb2.Learning())


async def test_a_redis_with_less_memory_than_the_streams_is_named(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, registry_port: int
) -> None:
    async def is_named() -> bool:
        return (await learning_at(registry_port)).too_small.startswith(
            "Redis has 100 MB for streams of 268 MB: raise its"
        )

    before = await streams.max_memory(redis)
    await redis.config_set("maxmemory", 10**8)
    try:
        with Trainer(tmp_path, tiny_target, redis_url, registry_port):
            await until(is_named, what="a report that Redis is too small")
    finally:
        await redis.config_set("maxmemory", before)


async def test_a_replay_that_is_too_small_to_judge_a_draft_is_named_until_it_is_as_large_as_it_says(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    async def is_enough() -> bool:
        done = await learning_at(registry_port)
        return bool(done.samples and not done.too_small)

    async def is_named() -> bool:
        return bool((await learning_at(registry_port)).too_small)

    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    for seed in range(24):
        await producer.append(traces.data(seed, evaluation=seed % 4 == 0, num_output=100))
    with Trainer(tmp_path, tiny_target, redis_url, registry_port, REPLAY_MAX_BYTES=str(1024**2)):
        await until(is_named, what="a report that replay is too small")
        sentence = (await learning_at(registry_port)).too_small
    found = re.search(r"raise UPDRAFT_TRAINER_REPLAY_MAX_BYTES to at least (\d+)$", sentence)
    assert found, sentence
    with Trainer(tmp_path, tiny_target, redis_url, registry_port, REPLAY_MAX_BYTES=found.group(1)):
        await until(is_enough, what="a report without that")


async def test_a_report_has_stored_requests_by_kind_the_lag_and_what_was_learned(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    async def is_told() -> bool:
        done = await learning_at(registry_port)
        return done.HasField("loss") and done.HasField("held_out_length")

    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    for seed in range(24):
        await producer.append(traces.data(seed, evaluation=seed % 4 == 0, num_output=100))
    with Trainer(tmp_path, tiny_target, redis_url, registry_port):
        await until(is_told, what="a report of a step and of an estimate")
        done = await learning_at(registry_port)
    assert sum(kind.samples for kind in done.kinds) == done.samples
    assert sum(kind.held_out for kind in done.kinds) == done.held_out
    assert sum(kind.recent_share for kind in done.kinds) == pytest.approx(1.0)
    assert done.lag_seconds >= 0.0
    assert any(kind.candidate_length >= 1.0 for kind in done.kinds)


async def test_a_tenant_that_is_forgotten_is_deleted_by_the_trainer_which_says_so_and_so_it_is_after_a_restart(
    redis: Redis, redis_url: str, tmp_path: Path, tiny_target: Path, traces: TraceMaker, registry_port: int
) -> None:
    producer = streams.Producer(redis, KEY, max_bytes=64 * 1024**2)
    acme, rival = (hashes.parse(f"{number:016x}") for number in (1, 2))
    for seed in range(40):
        await producer.append(traces.data(seed, tenant=acme if seed % 2 else rival, evaluation=seed % 8 < 2))
    trainer = Trainer(tmp_path, tiny_target, redis_url, registry_port)
    async with rpc.channel(f"127.0.0.1:{registry_port}") as channel:
        stub = registry_pb2_grpc.RegistryStub(channel)
        with trainer:
            await until(lambda: trainer.metric('publishes_total{outcome="stable"}') > 0, what="the first version")
            await until(lambda: is_settled(redis, KEY), what="an empty stream")
            tenant = await _forget(stub, acme)
            assert tenant.versions, "the first version learned from both"
            await until(lambda: _is_deleted(stub, acme), what="the trainer's word")
            assert trainer.metric('traces_deleted_total{reason="forgotten"}') == 20
            await producer.append(traces.data(1001, tenant=acme))  # of before the order
            await until(lambda: trainer.metric('samples_refused_total{reason="forgotten"}') == 1, what="a refusal")
            trainer.kill()
            trainer.start()
            await until(lambda: trainer.log().count("Trainer started") == 2, what="the second life")
            await producer.append(traces.data(1003, tenant=acme))
            await until(lambda: trainer.metric('samples_refused_total{reason="forgotten"}') == 1, what="a refusal")
            assert trainer.terminate() == 0
    assert "Traceback" not in trainer.log()


async def _forget(stub: "registry_pb2_grpc.RegistryAsyncStub", tenant: int) -> registry_pb2.Tenant:
    request = registry_pb2.ForgetTenantRequest(speculator="default", hash=tenant)
    return (await stub.ForgetTenant(request, timeout=LONG_S)).tenant


async def _is_deleted(stub: "registry_pb2_grpc.RegistryAsyncStub", tenant: int) -> bool:
    request = registry_pb2.ListTenantsRequest(speculator="default", hash=tenant)
    return (await stub.ListTenants(request, timeout=LONG_S)).tenants[0].is_deleted

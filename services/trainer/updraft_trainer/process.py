"""The trainer process: builds every component once and closes them in reverse order."""

import asyncio
import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_artifacts.sizing import CapturedTraffic, Sizing, sizing
from updraft_chassis import lifecycle, logs, metrics, settings, streams
from updraft_chassis.clock import SystemClock
from updraft_chassis.credentials import server_context
from updraft_chassis.errors import Conflict, Exhausted, InvalidInput
from updraft_chassis.streams.consumer import Consumer
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.coordination.ranks import Ranks, from_environment, joined, local_size
from updraft_trainer.coordination.watch import Activity, Watch
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.demand import FITTED_SAMPLES, DemandMeter
from updraft_trainer.data.forgetting import Forgetting, is_forgotten
from updraft_trainer.data.intake import Intake
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import ExpectedTarget
from updraft_trainer.data.sample_cache import DEFAULT_MAX_BYTES
from updraft_trainer.initial_state import InitialState, TrainerSpec, resume
from updraft_trainer.learning.compute import Compute
from updraft_trainer.metrics import Metrics
from updraft_trainer.rank_process import RankProcess
from updraft_trainer.settings import TrainerSettings
from updraft_trainer.states.newest_state import load_newest
from updraft_trainer.states.state import Identity, States

logger = logging.getLogger(__name__)

_POLICIES = {"normal": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}

_CLAIM_IDLE = timedelta(seconds=30)
"""Idle time after which another trainer's entries are taken over. Intake reads about every second, also during a training
step, and backs off for at most ten seconds while Redis is unavailable."""


def main() -> None:
    config = settings.load(TrainerSettings)
    logs.configure(process="trainer", level=config.log_level, format=config.log_format)
    # Serving may share this machine. Threads inherit both, and neither needs privileges.
    os.nice(config.niceness)
    os.sched_setscheduler(0, _POLICIES[config.scheduling], os.sched_param(0))
    torch.set_num_threads(config.num_threads)
    lifecycle.run("updraft-trainer", partial(serve, config))


async def serve(config: TrainerSettings, stop: lifecycle.Stop) -> None:
    """Train until `stop`, as one rank of several if torchrun started this process. UpdraftError if a component cannot start."""
    counters, clock = Metrics(CollectorRegistry()), SystemClock()
    watch, ready = Watch(clock), threading.Event()
    ranks = replace(from_environment(os.environ), waiting=watch.waiting)
    shards, compute = _own_shards(config, ranks), config.compute
    _show_activity(counters, watch, compute)
    identity = Identity(
        speculator=config.speculator,
        target_fingerprint=target_fingerprint(config.model),
        tokenizer_fingerprint=tokenizer_fingerprint(config.model),
    )
    target = read_head(config.model)
    expected = ExpectedTarget.of(
        target.config,
        target_fingerprint=identity.target_fingerprint,
        tokenizer_fingerprint=identity.tokenizer_fingerprint,
        region=config.region,
    )
    async with AsyncExitStack() as stack:
        data = stack.enter_context(_exclusive(_folder(config.data_dir, ranks)))
        port = stack.enter_context(
            metrics.serve(
                counters.registry,
                host=config.metrics_host,
                port=config.metrics_port and config.metrics_port + ranks.local_rank,
                ready=ready.is_set,
                setting="UPDRAFT_TRAINER_METRICS_PORT",
                tls=server_context(config.metrics_tls_cert_file, config.metrics_tls_key_file),
            )
        )
        client = streams.connect(config.redis_url.get_secret_value())
        stack.push_async_callback(client.aclose)
        try:
            with watch.during(Activity.JOIN):
                group = joined(os.environ, compute.device, check=stop.check)
                await asyncio.to_thread(stack.enter_context, group)
        except lifecycle.Stopped:
            return
        spec = _spec(config, target, identity, compute.on_ranks(ranks))
        states = States(data / "states")
        folder_id = _folder_id(data)
        folder_ids = await asyncio.to_thread(_agreed, ranks, identity, spec, folder_id)
        initial = await asyncio.to_thread(_resumed, states, identity, spec)
        sizes = _sizes(target, config)
        volume_bytes = _volume_bytes(config.data_dir) // local_size(os.environ)
        capacity = Capacity.of(config.replay_max_bytes, sizes, volume_bytes=volume_bytes)
        limits = ReplayLimits.of(capacity.replay_bytes, max_tenant_share=config.max_tenant_share)
        default_bytes = min(sizes.cache.amount, DEFAULT_MAX_BYTES)
        replay = stack.enter_context(
            Replay.open(
                data / "replay",
                limits=limits,
                expected=expected,
                cache_bytes=default_bytes if config.cache_max_bytes is None else config.cache_max_bytes,
                # During a fit, rank 0 holds the samples of all ranks.
                fitted_bytes=sizes.cache.amount // 2 // ranks.size,
            )
        )
        facts = {"metrics_port": port, "streams": [config.stream_keys[shard] for shard in shards]}
        facts |= {"replay_bytes": capacity.replay_bytes, "device": compute.device.type}
        facts |= {"pack_tokens": compute.pack_tokens, "rank": ranks.rank, "ranks": ranks.size}
        logger.info("Trainer started", extra=facts)
        process = RankProcess(
            config=config,
            ranks=ranks,
            identity=identity,
            spec=spec,
            data=data,
            capacity=capacity,
            version_bytes=sizes.version.amount,
            stream_bytes=config.capture_max_bytes or _stream_bytes(target, config),
            replay=replay,
            demand=DemandMeter(
                replay,
                limits,
                num_held_out=ranks.per_rank(config.evaluation_samples),
                num_fitted=ranks.per_rank(FITTED_SAMPLES),
                max_uses=config.max_uses,
            ),
            client=client,
            intakes=[
                Intake(
                    Consumer(
                        client,
                        config.stream_keys[shard],
                        group="trainer",
                        name=_consumer(config.pod_name, ranks),
                        claim_idle=_CLAIM_IDLE,
                        retention_s=config.retention_seconds,
                        is_unwanted=partial(is_forgotten, replay),
                    ),
                    replay,
                    expected,
                    metrics=counters,
                    clock=clock,
                    shard=shard,
                )
                for shard in shards
            ],
            forgetting=Forgetting(
                client,
                [config.stream_keys[shard] for shard in shards],
                replay,
                unread=_unread_keys(config) if ranks.leads else (),
                retention_s=config.retention_seconds,
                metrics=counters,
                clock=clock,
            ),
            metrics=counters,
            clock=clock,
            watch=watch,
            folder_id=folder_id,
            ready=ready,
        )
        await (process.lead(states, initial, folder_ids, stack, stop) if ranks.leads else process.follow(stop))


def _show_activity(counters: Metrics, watch: Watch, compute: Compute) -> None:
    """In a metric that is read at each scrape; torch.compile works within a training step."""
    for activity in Activity:
        counters.activity.labels(activity).set_function(partial(_is_busy_with, watch, activity))
    if compute.compiler is not None:
        compute.compiler.during = partial(watch.during, Activity.COMPILE)


def _is_busy_with(watch: Watch, activity: Activity) -> bool:
    return watch.phase.activity is activity


def _agreed(ranks: Ranks, identity: Identity, spec: TrainerSpec, folder_id: str) -> list[str]:
    """At rank 0 the data folders' ids of all ranks. Conflict everywhere if the ranks would train different drafts."""
    ranks.check_agreement(
        {
            **{name.replace("_", " "): value for name, value in asdict(identity).items()},
            "digest of training settings": spec.config_digest,
            "UPDRAFT_TRAINER_SHARDING": spec.compute.sharding,
        }
    )
    return ranks.gather(folder_id)


def _resumed(states: States, identity: Identity, spec: TrainerSpec) -> InitialState | None:
    """At rank 0, from the newest state of all ranks. In a function of its own, which frees the state's copy of the weights."""
    state = load_newest(states, identity, spec.compute.ranks)
    return resume(state, spec) if state else None


def _own_shards(config: TrainerSettings, ranks: Ranks) -> Sequence[int]:
    """The shards that this rank reads. InvalidInput if there are fewer than ranks."""
    if config.stream_shards < ranks.size:
        raise InvalidInput(
            f"UPDRAFT_TRAINER_STREAM_SHARDS is {config.stream_shards}, but each of {ranks.size} ranks needs a stream of its"
            f" own: set it, and UPDRAFT_INFERENCE_STREAM_SHARDS of the pods, to {ranks.size} or more"
        )
    return streams.shards_of(ranks.rank, ranks.size, config.stream_shards)


def _unread_keys(config: TrainerSettings) -> Sequence[str]:
    """Streams of pods with more shards than the trainer reads."""
    return streams.keys(config.namespace, config.speculator, streams.MAX_SHARDS)[config.stream_shards :]


def _folder(data_dir: Path, ranks: Ranks) -> Path:
    """By local rank: replay stays where its disk is when ranks change places, and a trainer that gets ranks keeps its own."""
    return data_dir / f"rank-{ranks.local_rank}" if ranks.local_rank else data_dir


def _consumer(pod_name: str, ranks: Ranks) -> str:
    return f"{pod_name}.{ranks.local_rank}" if ranks.local_rank else pod_name


def _spec(config: TrainerSettings, target: TargetHead, identity: Identity, compute: Compute) -> TrainerSpec:
    return TrainerSpec(
        target=target,
        target_fingerprint=identity.target_fingerprint,
        hyper=config.hyper,
        shape=config.shape,
        first_samples=config.first_samples,
        seed=config.seed,
        compute=compute,
    )


def _sizes(target: TargetHead, config: TrainerSettings) -> Sizing:
    """The sizes for engine torch, whose traces are larger: only the first trace tells which engine serves."""
    return sizing(target.config, target.draft(config.shape), CapturedTraffic(engine="torch"))


def _stream_bytes(target: TargetHead, config: TrainerSettings) -> int:
    """For engine sglang, whose streams are smaller, so that no Redis that is large enough is called too small."""
    return sizing(target.config, target.draft(config.shape), CapturedTraffic(engine="sglang")).stream.amount


def _volume_bytes(folder: Path) -> int:
    """The room that the folder can have: its size now, and the free bytes of its disk."""
    num_bytes = shutil.disk_usage(folder).free
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # of another rank that works already
            num_bytes += os.lstat(path).st_size
    return num_bytes


def _folder_id(folder: Path) -> str:
    """Made up once for a data folder, which only one process at a time uses."""
    path = folder / "id"
    try:
        if not (path.exists() and path.read_text()):
            path.write_text(uuid.uuid4().hex[:12])
        return path.read_text()
    except OSError as error:
        raise Exhausted(f"cannot write to {path}: {error.strerror}") from error


@contextmanager
def _exclusive(folder: Path) -> Iterator[Path]:
    """Create and lock the data folder until the block ends or the process dies. Conflict if that is impossible."""
    advice = "set UPDRAFT_TRAINER_DATA_DIR to another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("ab")
    except OSError as error:
        raise Conflict(f"cannot write to {folder} ({error.strerror}); {advice}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another trainer uses {folder}; stop it or {advice}") from None
        yield folder

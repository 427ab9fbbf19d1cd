"""The trainer process: builds every component once and closes them in reverse order."""

import asyncio
import fcntl
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from updraft.registry.v1 import registry_pb2_grpc
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_artifacts.sizing import CapturedTraffic, Sizing, sizing
from updraft_chassis import lifecycle, logs, metrics, rpc, settings, streams
from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import Conflict, UpdraftError
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.demand import DemandMeter
from updraft_trainer.data.intake import Intake, storable_together
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import ExpectedTarget
from updraft_trainer.data.sample_cache import DEFAULT_MAX_BYTES
from updraft_trainer.initial_state import InitialState, TrainerSpec, resume, start
from updraft_trainer.learning import hardware
from updraft_trainer.learning.compute import BATCH_TOKENS
from updraft_trainer.learning.state import Identity, States
from updraft_trainer.loop import Components, Trainer, TrainingOptions
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.curves import Curves
from updraft_trainer.publishing.evaluator import Evaluator
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView
from updraft_trainer.publishing.throughput import Throughput
from updraft_trainer.settings import TrainerSettings

logger = logging.getLogger(__name__)

_POLICIES = {"normal": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}

_DEMAND_S = 2.0
"""Time between two statements of the demand."""

_CLAIM_IDLE = timedelta(seconds=30)
"""Idle time after which another trainer's entries are taken over. Intake reads about every second, also during a training
step, and backs off for at most ten seconds while Redis is unavailable."""


_ASK_S = 30.0
"""Interval at which Redis is asked for its memory, which a person may raise while it runs."""


def main() -> None:
    config = settings.load(TrainerSettings)
    logs.configure(process="trainer", level=config.log_level, format=config.log_format)
    # Serving may share this machine. Threads inherit both, and neither needs privileges.
    os.nice(config.niceness)
    os.sched_setscheduler(0, _POLICIES[config.scheduling], os.sched_param(0))
    torch.set_num_threads(config.num_threads)
    lifecycle.run("updraft-trainer", partial(serve, config))


async def serve(config: TrainerSettings, stop: lifecycle.Stop) -> None:
    """Train until `stop`. UpdraftError if a component cannot start."""
    identity = Identity(
        speculator=config.speculator,
        target_fingerprint=target_fingerprint(config.model),
        tokenizer_fingerprint=tokenizer_fingerprint(config.model),
    )
    compute = config.compute
    device_name = hardware.device_name(compute.device)
    target = read_head(config.model)
    expected = ExpectedTarget.of(
        target.config,
        target_fingerprint=identity.target_fingerprint,
        tokenizer_fingerprint=identity.tokenizer_fingerprint,
        region=config.region,
    )
    counters, clock = Metrics(CollectorRegistry()), SystemClock()
    async with AsyncExitStack() as stack:
        data = stack.enter_context(_exclusive(config.data_dir))
        sizes = _sizes(target, config)
        capacity = Capacity.of(config.replay_max_bytes, sizes, volume_bytes=_volume_bytes(data))
        states = States(data / "states")
        state = states.load(identity)
        limits = ReplayLimits.of(capacity.replay_bytes)
        default_bytes = min(sizes.cache.amount, DEFAULT_MAX_BYTES)
        replay = stack.enter_context(
            Replay.open(
                data / "replay",
                limits=limits,
                expected=expected,
                cache_bytes=default_bytes if config.cache_max_bytes is None else config.cache_max_bytes,
                fitted_bytes=sizes.cache.amount // 2,
            )
        )
        stream_bytes = config.capture_max_bytes or _stream_bytes(target, config)
        record = LearningRecord(
            replay,
            capacity,
            min_samples=config.min_samples,
            version_bytes=sizes.version.amount,
            stream_bytes=stream_bytes,
            samples_to_start=config.first_samples,
        )
        peak = config.peak_flops or hardware.peak_flops(device_name)
        record.throughput = Throughput(device=device_name, world_size=compute.ranks.size, peak_flops=peak)
        spec = TrainerSpec(
            target=target,
            target_fingerprint=identity.target_fingerprint,
            hyper=config.hyper,
            shape=config.shape,
            first_samples=config.first_samples,
            seed=config.seed,
            compute=compute,
        )
        initial = resume(state, spec) if state else None
        del state  # frees its copy of the weights
        port = stack.enter_context(
            metrics.serve(
                counters.registry,
                host=config.metrics_host,
                port=config.metrics_port,
                ready=lambda: True,
                setting="UPDRAFT_TRAINER_METRICS_PORT",
            )
        )
        client = streams.connect(config.redis_url.get_secret_value())
        stack.push_async_callback(client.aclose)
        channel = await stack.enter_async_context(rpc.channel(config.registry_address, config.registry_credentials))
        stub = registry_pb2_grpc.RegistryStub(channel)
        registry = RegistryView(stub, config.speculator, data / "drafts", counters, learning=record.read)
        components = Components(
            replay=replay,
            registry=registry,
            evaluator=Evaluator(
                replay,
                registry,
                num_samples=config.evaluation_samples,
                lookahead=config.lookahead,
                check=stop.check,
            ),
            publisher=Publisher(
                stub,
                identity=identity,
                config_digest=spec.config_digest,
                folder=data / "candidate",
                clock=clock,
            ),
            states=states,
            record=record,
            monitor=Monitor(counters, record.throughput, clock, device=compute.device, curves=_curves(config, clock)),
            demand=DemandMeter(replay, limits, num_held_out=config.evaluation_samples, max_uses=config.max_uses),
            metrics=counters,
            clock=clock,
            check=stop.check,
        )
        facts = {"metrics_port": port, "streams": config.stream_keys, "replay_bytes": capacity.replay_bytes}
        facts |= {"device": device_name, "pack_tokens": compute.pack_tokens}
        logger.info("Trainer started", extra=facts)
        intakes = [
            Intake(
                streams.Consumer(
                    client, config.stream_keys[shard], group="trainer", name=config.pod_name, claim_idle=_CLAIM_IDLE
                ),
                replay,
                expected,
                metrics=counters,
                clock=clock,
                shard=shard,
            )
            for shard in streams.shards_of(0, 1, config.stream_shards)
        ]
        async with asyncio.TaskGroup() as tasks:
            for intake in intakes:
                tasks.create_task(intake.run(stop))
            tasks.create_task(_ask_redis(client, record, stop))
            tasks.create_task(registry.run(stop))
            tasks.create_task(_state_demand(components, intakes, stream_bytes, stop))
            tasks.create_task(_train(config, spec, initial, components, identity, stop))


async def _train(
    config: TrainerSettings,
    spec: TrainerSpec,
    initial: InitialState | None,
    components: Components,
    identity: Identity,
    stop: lifecycle.Stop,
) -> None:
    with suppress(lifecycle.Stopped):
        initial = initial or await start(spec, components.registry, components.replay, stop)
    if initial is not None:
        options = TrainingOptions(
            batch_tokens=config.batch_tokens or BATCH_TOKENS[spec.compute.device.type],
            max_uses=config.max_uses,
            schedule=config.schedule,
            thresholds=config.thresholds,
        )
        trainer = Trainer(initial, components, options, identity=identity, spec=spec)
        await trainer.run(stop)


async def _state_demand(
    components: Components, intakes: Sequence[Intake], stream_bytes: int, stop: lifecycle.Stop
) -> None:
    """Tell the registry how many captured tokens can be stored and used, also while a step or a fit takes minutes."""
    most = math.inf
    while not stop.requested:
        usable = await asyncio.to_thread(components.demand.tokens_per_s)
        with suppress(UpdraftError):  # while Redis is away, nothing comes
            most = await storable_together(intakes, stream_bytes)
        components.registry.set_demand(min(usable, most))
        await stop.wait(_DEMAND_S)


def _curves(config: TrainerSettings, clock: Clock) -> Curves | None:
    return Curves(config.tensorboard_dir / config.speculator, clock) if config.tensorboard_dir else None


def _sizes(target: TargetHead, config: TrainerSettings) -> Sizing:
    """The sizes for engine torch, whose traces are larger: only the first trace tells which engine serves."""
    return sizing(target.config, target.draft(config.shape), CapturedTraffic(engine="torch"))


def _stream_bytes(target: TargetHead, config: TrainerSettings) -> int:
    """For engine sglang, whose streams are smaller, so that no Redis that is large enough is called too small."""
    return sizing(target.config, target.draft(config.shape), CapturedTraffic(engine="sglang")).stream.amount


async def _ask_redis(client: streams.Client, record: LearningRecord, stop: lifecycle.Stop) -> None:
    """Keep the record's view of Redis's memory. A Redis that is away or does not report it leaves it as it is."""
    while not stop.requested:
        with suppress(UpdraftError):
            record.max_memory = await streams.max_memory(client)
        await stop.wait(_ASK_S)


def _volume_bytes(folder: Path) -> int:
    """The room that the folder can have: its size now, and the free bytes of its disk."""
    sizes = (os.lstat(path).st_size for path in folder.rglob("*"))
    return shutil.disk_usage(folder).free + sum(sizes)


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

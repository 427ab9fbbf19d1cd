"""The trainer process: builds every component once and closes them in reverse order."""

import asyncio
import fcntl
import logging
import math
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
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
from updraft_chassis.errors import Conflict, Exhausted, InvalidInput, UpdraftError
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.commands import CommandChannel
from updraft_trainer.coordination.lease import Lease
from updraft_trainer.coordination.notices import Notice, Notices
from updraft_trainer.coordination.ranks import Ranks, joined, local_size, placed
from updraft_trainer.coordination.watch import StallLog, Watch
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.demand import DemandMeter, RankDemand, together
from updraft_trainer.data.intake import Intake, storable_together
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import Pool, ReplayLimits
from updraft_trainer.data.sample import ExpectedTarget
from updraft_trainer.data.sample_cache import DEFAULT_MAX_BYTES
from updraft_trainer.following import Follower, Followers, StepOptions
from updraft_trainer.initial_state import InitialState, TrainerSpec, resume, start
from updraft_trainer.learning import hardware
from updraft_trainer.learning.compute import BATCH_TOKENS
from updraft_trainer.loop import Components, Trainer, TrainingOptions
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.curves import Curves
from updraft_trainer.publishing.evaluator import Evaluator, Judge
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView
from updraft_trainer.publishing.throughput import Throughput
from updraft_trainer.settings import TrainerSettings
from updraft_trainer.states.newest_state import load_newest
from updraft_trainer.states.state import Identity, States

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
    """Train until `stop`, as one rank of several if torchrun started this process. UpdraftError if a component cannot start."""
    counters, clock = Metrics(CollectorRegistry()), SystemClock()
    watch = Watch(clock)
    ranks = replace(placed(os.environ), waiting=watch.waiting)
    shards = _own_shards(config, ranks)
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
                ready=lambda: True,
                setting="UPDRAFT_TRAINER_METRICS_PORT",
            )
        )
        client = streams.connect(config.redis_url.get_secret_value())
        stack.push_async_callback(client.aclose)
        group = joined(os.environ, config.compute.device, check=stop.check)
        try:
            await asyncio.to_thread(stack.enter_context, group)
        except lifecycle.Stopped:
            return
        spec = _spec(config, target, identity, ranks)
        states = States(data / "states")
        initial = _resumed(states, identity, spec)
        sizes = _sizes(target, config)
        volume_bytes = _volume_bytes(config.data_dir) // local_size(os.environ)
        capacity = Capacity.of(config.replay_max_bytes, sizes, volume_bytes=volume_bytes)
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
        facts = {"metrics_port": port, "streams": [config.stream_keys[shard] for shard in shards]}
        facts |= {"replay_bytes": capacity.replay_bytes, "device": config.compute.device.type}
        facts |= {"pack_tokens": config.compute.pack_tokens, "rank": ranks.rank, "ranks": ranks.size}
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
            demand=DemandMeter(replay, limits, num_held_out=config.evaluation_samples, max_uses=config.max_uses),
            client=client,
            intakes=[
                Intake(
                    streams.Consumer(
                        client,
                        config.stream_keys[shard],
                        group="trainer",
                        name=_consumer(config.pod_name, ranks),
                        claim_idle=_CLAIM_IDLE,
                    ),
                    replay,
                    expected,
                    metrics=counters,
                    clock=clock,
                    shard=shard,
                )
                for shard in shards
            ],
            metrics=counters,
            clock=clock,
            watch=watch,
        )
        await (process.lead(states, initial, stack, stop) if ranks.leads else process.follow(stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
    """What a rank has, whether it leads or follows."""

    config: TrainerSettings
    ranks: Ranks
    identity: Identity
    spec: TrainerSpec
    data: Path
    capacity: Capacity
    version_bytes: int
    stream_bytes: int
    replay: Replay
    demand: DemandMeter
    client: streams.Client
    intakes: Sequence[Intake]
    metrics: Metrics
    clock: SystemClock
    watch: Watch

    async def lead(
        self, states: States, initial: InitialState | None, stack: AsyncExitStack, stop: lifecycle.Stop
    ) -> None:
        """Train, decide and publish until `stop`, and let the other ranks follow."""
        config = self.config
        followers, notices = Followers(self.ranks, self._channel(), watch=self.watch), Notices(self.ranks, self.clock)
        lease = await stack.enter_async_context(self._lease())
        await lease.wait(stop)
        if stop.requested:
            await asyncio.to_thread(followers.end)
            return
        await asyncio.to_thread(followers.begin)
        record = LearningRecord(
            self.replay,
            self.capacity,
            min_samples=config.min_samples,
            version_bytes=self.version_bytes,
            stream_bytes=self.stream_bytes,
            samples_to_start=config.first_samples,
        )
        device = self.spec.compute.device
        name = hardware.device_name(device)
        peak = config.peak_flops or hardware.peak_flops(name)
        record.throughput = Throughput(device=name, world_size=self.ranks.size, peak_flops=peak)
        channel = await stack.enter_async_context(rpc.channel(config.registry_address, config.registry_credentials))
        stub = registry_pb2_grpc.RegistryStub(channel)
        registry = RegistryView(stub, config.speculator, self.data / "drafts", self.metrics, learning=record.read)
        components = Components(
            replay=self.replay,
            registry=registry,
            evaluator=Evaluator(
                self.replay,
                registry,
                num_samples=followers.each(config.evaluation_samples),
                lookahead=config.lookahead,
                check=stop.check,
                gather=followers.evidence,
            ),
            publisher=Publisher(
                stub,
                identity=self.identity,
                config_digest=self.spec.config_digest,
                folder=self.data / "candidate",
                clock=self.clock,
                check=lease.check,
            ),
            states=states,
            record=record,
            monitor=Monitor(
                self.metrics, record.throughput, self.clock, device=device, curves=_curves(config, self.clock)
            ),
            demand=self.demand,
            metrics=self.metrics,
            clock=self.clock,
            check=stop.check,
            followers=followers,
        )

        def state_demand(notice: Notice, others: Sequence[Notice]) -> None:
            record.elsewhere = sum(one.samples for one in others), sum(one.held_out for one in others)
            demands = [notice.demand, *(one.demand for one in others)]
            registry.set_demand(together(demands, config.stream_shards))

        async with asyncio.TaskGroup() as tasks:
            for intake in self.intakes:
                tasks.create_task(intake.run(stop))
            tasks.create_task(_ask_redis(self.client, config, record, stop))
            tasks.create_task(lease.hold(stop))
            tasks.create_task(registry.run(stop))
            tasks.create_task(self._post_notices(notices, state_demand, stop))
            tasks.create_task(self._train(initial, components, stop))

    async def follow(self, stop: lifecycle.Stop) -> None:
        """Obey rank 0 until it ends."""
        channel, notices = self._channel(), Notices(self.ranks, self.clock)
        assert channel is not None, "a rank that follows is not alone"
        config, size = self.config, self.ranks.size
        follower = Follower(
            self.ranks,
            channel,
            self.spec,
            self.replay,
            Judge(
                self.replay,
                num_samples=-(-config.evaluation_samples // size),
                lookahead=config.lookahead,
                check=stop.check,
            ),
            StepOptions(
                batch_tokens=config.batch_tokens or BATCH_TOKENS[self.spec.compute.device.type],
                max_uses=config.max_uses,
                num_waiting=-(-config.min_samples // size),
            ),
            demand=self.demand,
            metrics=self.metrics,
            clock=self.clock,
            watch=self.watch,
        )
        if not await asyncio.to_thread(follower.obey, stop):  # the first command: to begin, or to end
            return
        async with asyncio.TaskGroup() as tasks:
            for intake in self.intakes:
                tasks.create_task(intake.run(stop))
            tasks.create_task(self._post_notices(notices, lambda _own, _others: None, stop))
            tasks.create_task(follower.run(stop))

    @asynccontextmanager
    async def _lease(self) -> AsyncIterator[Lease]:
        """Released at the end. A trainer that was killed has it again at once, because it has the same folder."""
        config = self.config
        lease = Lease(
            self.client,
            streams.lease_key(config.namespace, config.speculator),
            f"the trainer {config.pod_name} ({_folder_id(self.data)})",
            duration_s=config.lease_seconds,
            clock=self.clock,
            on_change=self.metrics.leads.set,
        )
        yield lease
        with suppress(UpdraftError):
            await lease.release()

    def _channel(self) -> CommandChannel | None:
        return CommandChannel(self.ranks, self.spec.compute.device) if self.ranks.size > 1 else None

    async def _train(self, initial: InitialState | None, components: Components, stop: lifecycle.Stop) -> None:
        config = self.config
        with suppress(lifecycle.Stopped):
            initial = initial or await start(self.spec, components.registry, self.replay, stop)
        if initial is None:
            await asyncio.to_thread(components.followers.end)
            return
        options = TrainingOptions(
            batch_tokens=config.batch_tokens or BATCH_TOKENS[self.spec.compute.device.type],
            max_uses=config.max_uses,
            schedule=config.schedule,
            thresholds=config.thresholds,
        )
        await Trainer(initial, components, options, identity=self.identity, spec=self.spec).run(stop)

    async def _post_notices(
        self, notices: Notices, use: Callable[[Notice, Sequence[Notice]], None], stop: lifecycle.Stop
    ) -> None:
        """Post this rank's notice and hand it with those of the others to `use`, also while a step or a fit takes minutes."""
        stalls, num_intakes = StallLog(self.config.stall_seconds), len(self.intakes)
        stream_bytes = self.stream_bytes * num_intakes // self.config.stream_shards
        storable = math.inf
        while not stop.requested:
            usable = await asyncio.to_thread(self.demand.tokens_per_s)
            with suppress(UpdraftError):  # while Redis is away, nothing comes
                storable = await storable_together(self.intakes, stream_bytes) / num_intakes
            notice = Notice(
                rank=self.ranks.rank,
                demand=RankDemand(usable=usable, storable=storable),
                samples=self.replay.num_requests(Pool.WINDOW, Pool.RESERVOIR),
                held_out=self.replay.num_requests(Pool.EVALUATION),
                phase=self.watch.phase,
            )
            notices.post(notice)
            use(notice, notices.of_others())
            if sentence := stalls.sentence(notice.rank, notice.phase, notices.seen()):
                self.metrics.stalls.labels(notice.phase.name).inc()
                logger.warning("Training stalls: %s", sentence)
            await stop.wait(_DEMAND_S)


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


def _folder(data_dir: Path, ranks: Ranks) -> Path:
    """By local rank: replay stays where its disk is when ranks change places, and a trainer that gets ranks keeps its own."""
    return data_dir / f"rank-{ranks.local_rank}" if ranks.local_rank else data_dir


def _consumer(pod_name: str, ranks: Ranks) -> str:
    return f"{pod_name}.{ranks.local_rank}" if ranks.local_rank else pod_name


def _spec(config: TrainerSettings, target: TargetHead, identity: Identity, ranks: Ranks) -> TrainerSpec:
    return TrainerSpec(
        target=target,
        target_fingerprint=identity.target_fingerprint,
        hyper=config.hyper,
        shape=config.shape,
        first_samples=config.first_samples,
        seed=config.seed,
        compute=config.compute.together(ranks),
    )


def _curves(config: TrainerSettings, clock: Clock) -> Curves | None:
    return Curves(config.tensorboard_dir / config.speculator, clock) if config.tensorboard_dir else None


def _sizes(target: TargetHead, config: TrainerSettings) -> Sizing:
    """The sizes for engine torch, whose traces are larger: only the first trace tells which engine serves."""
    return sizing(target.config, target.draft(config.shape), CapturedTraffic(engine="torch"))


def _stream_bytes(target: TargetHead, config: TrainerSettings) -> int:
    """For engine sglang, whose streams are smaller, so that no Redis that is large enough is called too small."""
    return sizing(target.config, target.draft(config.shape), CapturedTraffic(engine="sglang")).stream.amount


async def _ask_redis(
    client: streams.Client, config: TrainerSettings, record: LearningRecord, stop: lifecycle.Stop
) -> None:
    """Keep the record's view of Redis's memory, and name shards that nobody reads. A Redis that is away or does not report its
    memory changes nothing."""
    unowned: list[int] = []
    while not stop.requested:
        with suppress(UpdraftError):
            record.max_memory = await streams.max_memory(client)
        with suppress(UpdraftError):
            before, unowned = unowned, await _unowned(client, config)
            if unowned and unowned != before:
                logger.warning(
                    "Nobody reads the traces of shard %s: set UPDRAFT_TRAINER_STREAM_SHARDS to the pods'"
                    " UPDRAFT_INFERENCE_STREAM_SHARDS",
                    ", ".join(map(str, unowned)),
                )
        await stop.wait(_ASK_S)


async def _unowned(client: streams.Client, config: TrainerSettings) -> list[int]:
    return await streams.unowned_shards(client, config.namespace, config.speculator, config.stream_shards)


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

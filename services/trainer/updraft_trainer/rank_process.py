"""One rank of the trainer, after it has joined the others: what it has, and the tasks that it runs as leader or follower."""

import asyncio
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import lifecycle, rpc, streams
from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.errors import Unavailable, UpdraftError
from updraft_trainer.commands import CommandChannel
from updraft_trainer.components import Components, TrainingOptions
from updraft_trainer.coordination.heartbeats import Heartbeat, Heartbeats
from updraft_trainer.coordination.lease import Lease
from updraft_trainer.coordination.ranks import Ranks
from updraft_trainer.coordination.watch import PeerState, StallLog, Watch, is_compiling
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.demand import DemandMeter, RankDemand, combined_demand
from updraft_trainer.data.forgetting import Forgetting
from updraft_trainer.data.intake import Intake, storable_together
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import Pool
from updraft_trainer.following import Follower, Followers, StepOptions
from updraft_trainer.initial_state import Elsewhere, InitialState, TrainerSpec, start
from updraft_trainer.learning import hardware
from updraft_trainer.learning.compute import BATCH_TOKENS
from updraft_trainer.loop import Trainer
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.curves import Curves
from updraft_trainer.publishing.evaluator import Evaluator, Judge
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView
from updraft_trainer.publishing.throughput import Throughput
from updraft_trainer.settings import TrainerSettings
from updraft_trainer.states.state import Identity, States

logger = logging.getLogger(__name__)

_DEMAND_S = 2.0
"""Time between two statements of the demand."""

_ASK_S = 30.0
"""Interval at which Redis is asked for its memory, which a person may raise while it runs."""

_MAY_READ_S = 0.5
"""Interval at which intake asks whether it may begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
    """The parts of a rank, whether it leads or follows."""

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
    forgetting: Forgetting
    metrics: Metrics
    clock: SystemClock
    watch: Watch
    folder_id: str
    ready: threading.Event
    """Set when this rank works, or waits for another trainer and has said so."""
    may_read: threading.Event = field(default_factory=threading.Event)
    """Set once no other trainer reads the traces."""

    async def lead(
        self,
        states: States,
        initial: InitialState | None,
        folder_ids: Sequence[str],
        stack: AsyncExitStack,
        stop: lifecycle.Stop,
    ) -> None:
        """Train, decide and publish until `stop`, and let the other ranks follow. `folder_ids`: of all ranks, in order."""
        config = self.config
        channel, heartbeats = await asyncio.to_thread(self._connected)
        followers = Followers(self.ranks, channel, watch=self.watch)
        lease = await stack.enter_async_context(self._lease())
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
        connection = await stack.enter_async_context(rpc.channel(config.registry_address, config.registry_credentials))
        stub = registry_pb2_grpc.RegistryStub(connection)
        registry = RegistryView(stub, config.speculator, self.data / "drafts", self.metrics, learning=record.read)
        components = Components(
            replay=self.replay,
            registry=registry,
            evaluator=Evaluator(
                self.replay,
                registry,
                num_samples=self.ranks.per_rank(config.evaluation_samples),
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
            folder_ids=folder_ids,
        )

        def use(heartbeat: Heartbeat, others: Sequence[Heartbeat]) -> None:
            if any(one.is_stopping for one in others):
                stop.request()
            record.elsewhere = sum(one.samples for one in others), sum(one.held_out for one in others)
            self.forgetting.orders = registry.forgotten
            done_ms = [heartbeat.forgotten_ms, *(one.forgotten_ms for one in others)]
            record.forgotten_ms = min(done_ms) if len(done_ms) == self.ranks.size else 0
            record.lag_s = max((intake.lag_s for intake in self.intakes if intake.lag_s is not None), default=None)
            demands = [heartbeat.demand, *(one.demand for one in others)]
            registry.set_demand(combined_demand(demands, config.stream_shards))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._post_heartbeats(heartbeats, use, stop))
            await lease.wait(stop)
            if stop.requested:
                await asyncio.to_thread(followers.end)
                return
            for intake in self.intakes:
                tasks.create_task(self._read(intake, stop))
            tasks.create_task(self._forget(stop))
            tasks.create_task(_ask_redis(self.client, config, record, stop))
            tasks.create_task(lease.hold(stop))
            tasks.create_task(registry.run(stop))
            tasks.create_task(self._train(initial, components, stop))

    async def follow(self, stop: lifecycle.Stop) -> None:
        """Obey rank 0 until it ends."""
        channel, heartbeats = await asyncio.to_thread(self._connected)
        assert channel is not None, "a rank that follows is not alone"
        config = self.config
        follower = Follower(
            self.ranks,
            channel,
            self.spec,
            self.replay,
            Judge(
                self.replay,
                num_samples=self.ranks.per_rank(config.evaluation_samples),
                lookahead=config.lookahead,
                check=stop.check,
            ),
            StepOptions(
                batch_tokens=self._batch_tokens,
                max_uses=config.max_uses,
                num_waiting=self.ranks.per_rank(config.min_samples),
            ),
            folder_id=self.folder_id,
            demand=self.demand,
            metrics=self.metrics,
            clock=self.clock,
            watch=self.watch,
        )

        def use(_: Heartbeat, others: Sequence[Heartbeat]) -> None:
            if any(one.may_read for one in others):
                self.may_read.set()
            self.forgetting.orders = next((one.forgotten for one in others if one.rank == 0), {})

        self.ready.set()
        async with asyncio.TaskGroup() as tasks:
            for intake in self.intakes:
                tasks.create_task(self._read(intake, stop))
            tasks.create_task(self._forget(stop))
            tasks.create_task(self._post_heartbeats(heartbeats, use, stop))
            tasks.create_task(follower.run(stop))

    @asynccontextmanager
    async def _lease(self) -> AsyncIterator[Lease]:
        """Released at the end. A trainer that was killed has it again at once, because it has the same folder."""
        config = self.config

        def follow_change(is_held: bool) -> None:  # noqa: FBT001 - a callback
            self.metrics.leads.set(is_held)
            if is_held:
                self.may_read.set()
            self.ready.set()

        lease = Lease(
            self.client,
            streams.lease_key(config.namespace, config.speculator),
            f"the trainer {config.pod_name} ({self.folder_id})",
            holder_id=self.folder_id,
            duration_s=config.lease_seconds,
            clock=self.clock,
            on_change=follow_change,
        )
        yield lease
        with suppress(UpdraftError):
            await lease.release()

    def _connected(self) -> tuple[CommandChannel | None, Heartbeats]:
        """To the other ranks, all of which call this at the same time."""
        channel = CommandChannel(self.ranks, self.spec.compute.device) if self.ranks.size > 1 else None
        return channel, Heartbeats(self.ranks, self.clock)

    @property
    def _batch_tokens(self) -> int | None:
        return self.config.batch_tokens or BATCH_TOKENS[self.spec.compute.device.type]

    async def _read(self, intake: Intake, stop: lifecycle.Stop) -> None:
        """Until `stop`, once no other trainer reads: after an outage of Redis, only the lease tells."""
        if self.ranks.leads and not self.may_read.is_set():
            intake.wait("Redis does not say whether another trainer reads")
        await self._until_may_read(stop)
        await intake.run(stop)

    async def _forget(self, stop: lifecycle.Stop) -> None:
        await self._until_may_read(stop)
        await self.forgetting.run(stop)

    async def _until_may_read(self, stop: lifecycle.Stop) -> None:
        while not (self.may_read.is_set() or stop.requested):
            await stop.wait(_MAY_READ_S)

    async def _train(self, initial: InitialState | None, components: Components, stop: lifecycle.Stop) -> None:
        config = self.config
        with suppress(lifecycle.Stopped):
            followers = components.followers
            initial = initial or await start(
                self.spec,
                components.registry,
                self.replay,
                stop,
                busy=followers.busy,
                elsewhere=Elsewhere(
                    num_requests=lambda: components.record.elsewhere[0], samples=followers.first_samples
                ),
            )
        if initial is None:
            await asyncio.to_thread(components.followers.end)
            return
        options = TrainingOptions(
            batch_tokens=self._batch_tokens,
            max_uses=config.max_uses,
            schedule=config.schedule,
            thresholds=config.thresholds,
        )
        await Trainer(initial, components, options, identity=self.identity, spec=self.spec).run(stop)

    async def _post_heartbeats(
        self, heartbeats: Heartbeats, use: Callable[[Heartbeat, Sequence[Heartbeat]], None], stop: lifecycle.Stop
    ) -> None:
        """Post heartbeats and pass each with those of the others to `use`, also while a step or a fit takes minutes."""
        stalls, num_intakes = StallLog(self.config.stall_seconds), len(self.intakes)
        stream_bytes = self.stream_bytes * num_intakes // self.config.stream_shards
        storable = math.inf
        is_stopping = False
        while not is_stopping:
            is_stopping = stop.requested  # the last heartbeat says so
            usable = await asyncio.to_thread(self.demand.tokens_per_s)
            with suppress(UpdraftError):  # while Redis is away, nothing comes
                storable = await storable_together(self.intakes, stream_bytes) / num_intakes
            heartbeat = Heartbeat(
                rank=self.ranks.rank,
                demand=RankDemand(usable=usable, storable=storable),
                samples=self.replay.num_requests(Pool.WINDOW, Pool.RESERVOIR),
                held_out=self.replay.num_requests(Pool.EVALUATION),
                phase=self.watch.phase,
                is_stopping=is_stopping,
                may_read=self.ranks.leads and self.may_read.is_set(),
                forgotten=self.forgetting.orders if self.ranks.leads else {},
                forgotten_ms=self.forgetting.done_ms,
            )
            try:
                use(heartbeat, await asyncio.to_thread(heartbeats.exchange, heartbeat))
            except Unavailable:
                if stop.requested:  # the others have ended before
                    return
                raise
            self._log_stall(stalls, heartbeat, heartbeats.peers())
            await stop.wait(_DEMAND_S)

    def _log_stall(self, stalls: StallLog, own: Heartbeat, others: Sequence[PeerState]) -> None:
        sentence = stalls.sentence(own.rank, own.phase, others)
        if sentence and is_compiling(own.phase, others):
            logger.info("Training waits for torch.compile: %s", sentence)
        elif sentence:
            self.metrics.stalls.labels(own.phase.activity).inc()
            logger.warning("Training stalls: %s", sentence)


def _curves(config: TrainerSettings, clock: Clock) -> Curves | None:
    return Curves(config.tensorboard_dir / config.speculator, clock) if config.tensorboard_dir else None


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

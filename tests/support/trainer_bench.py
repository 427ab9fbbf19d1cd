"""A trainer's parts around a real registry, with the clock in the test's hand; of several ranks, those of one of them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.tiny_target import make_draft
from tests.support.traces import TraceMaker
from tests.support.wait import LONG_S, until
from torch import Tensor

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1 import registry_pb2_grpc
from updraft_artifacts import transfer
from updraft_artifacts.digests import file_digest, tensors_digest
from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.sizing import usual
from updraft_chassis import rpc
from updraft_chassis.errors import Unavailable
from updraft_chassis.lifecycle import Stop
from updraft_draft import checkpoint
from updraft_draft.target_weights import read_head
from updraft_trainer.commands import CommandChannel
from updraft_trainer.components import Components, TrainingOptions
from updraft_trainer.coordination.ranks import ALONE, Ranks
from updraft_trainer.coordination.watch import Watch
from updraft_trainer.data.capacity import Capacity
from updraft_trainer.data.demand import DemandMeter
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import read_sample
from updraft_trainer.following import Follower, Followers, StepOptions
from updraft_trainer.initial_state import InitialState, TrainerSpec, start
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.learner import Hyperparameters
from updraft_trainer.loop import Trainer
from updraft_trainer.metrics import Metrics
from updraft_trainer.publishing.decision import PublishThresholds
from updraft_trainer.publishing.evaluator import Evaluator, Judge
from updraft_trainer.publishing.monitor import Monitor
from updraft_trainer.publishing.publish import Candidate, Publisher
from updraft_trainer.publishing.record import LearningRecord
from updraft_trainer.publishing.registry_view import RegistryView
from updraft_trainer.publishing.schedule import TrainingSchedule
from updraft_trainer.publishing.throughput import Throughput
from updraft_trainer.states.state import Identity, States

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

NUM_JUDGES, LOOKAHEAD = 32, 3

OPTIONS = TrainingOptions(
    batch_tokens=None,
    max_uses=6,
    schedule=TrainingSchedule(evaluate_steps=10, evaluate_seconds=15.0, checkpoint_seconds=60.0),
    thresholds=PublishThresholds(min_samples=8, min_gain_percent=1.0, min_first_gain_percent=15.0, confidence=0.9),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """See above."""

    folder: Path
    traces: TraceMaker
    replay: Replay
    spec: TrainerSpec
    channel: CommandChannel
    identity: Identity
    components: Components
    clock: ManualClock
    metrics: Metrics
    stub: "RegistryAsyncStub"

    def admit(
        self,
        start: int,
        end: int,
        *,
        rule: int = 0,
        evaluation: bool = False,
        num_output: int = 24,
        domain: str = "",
        tenant: int = 0,
    ) -> None:
        data = [
            self.traces.data(
                seed, rule=rule, evaluation=evaluation, num_output=num_output, domain=domain, tenant=tenant
            )
            for seed in range(start, end)
        ]
        expected = self.traces.expected
        self.replay.admit([IncomingTrace(sample=read_sample(one, expected), data=one) for one in data])

    def trainer(self, initial: InitialState, *, options: TrainingOptions = OPTIONS) -> Trainer:
        return Trainer(initial, self.components, options, identity=self.identity, spec=self.spec)

    def follower(self) -> Follower:
        """For a rank other than 0."""
        ranks = self.spec.compute.ranks
        return Follower(
            ranks,
            self.channel,
            self.spec,
            self.replay,
            Judge(self.replay, num_samples=ranks.per_rank(NUM_JUDGES), lookahead=LOOKAHEAD),
            StepOptions(
                batch_tokens=OPTIONS.batch_tokens,
                max_uses=OPTIONS.max_uses,
                num_waiting=ranks.per_rank(OPTIONS.thresholds.min_samples),
            ),
            folder_id=self.folder.name,
            demand=self.components.demand,
            metrics=self.metrics,
            clock=self.clock,
            watch=Watch(self.clock),
        )

    async def refresh(self) -> None:
        """Ask the registry, once it can be reached (a channel takes its time to come back)."""

        async def has_looked() -> bool:
            try:
                await self.components.registry.refresh()
            except Unavailable:
                return False
            return True

        await until(has_looked, what="the registry's answer")

    async def initial(self) -> InitialState:
        await self.refresh()
        initial = await start(self.spec, self.components.registry, self.replay, Stop())
        assert initial is not None
        return initial

    async def started(self) -> Trainer:
        """A trainer on 40 traces of the first rule, 12 more held out."""
        self.admit(0, 32)
        self.admit(1000, 1012, evaluation=True)
        return self.trainer(await self.initial())

    async def train(self, trainer: Trainer) -> None:
        """Learn until all is learnt, estimating and publishing on the way, as the loop does."""
        while trainer.train():
            await self.refresh()
            if candidate := await trainer.evaluate():
                await trainer.publish(candidate)

    async def state(self) -> pb.SpeculatorState:
        """As the registry has it, after a report."""
        await self.components.registry.report()
        with rpc.errors():
            answer = await self.stub.List(pb.ListRequest(speculator=self.identity.speculator), timeout=LONG_S)
        return answer.speculators[0]

    async def trainer_message(self) -> str:
        return (await self.state()).trainer_message

    async def publish_closed_form(self, trainer: Trainer) -> Candidate:
        """The draft in closed form that is due, after it serves."""
        candidate = await trainer.fit()
        assert candidate is not None
        await trainer.publish(candidate)
        await self.refresh()
        return candidate

    async def versions(self) -> list[pb.Version]:
        """Oldest first, whole."""
        with rpc.errors():
            answer = await self.stub.List(
                pb.ListRequest(speculator=self.identity.speculator, full=True), timeout=LONG_S
            )
        return list(reversed(answer.versions))

    async def pin(self, version: int) -> None:
        request = pb.PinRequest(speculator=self.identity.speculator, version=version, reason="test")
        with rpc.errors():
            await self.stub.Pin(request, timeout=LONG_S)

    async def set_policy(self, policy: pb.RolloutPolicy) -> None:
        request = pb.SetPolicyRequest(speculator=self.identity.speculator, policy=policy)
        with rpc.errors():
            await self.stub.SetPolicy(request, timeout=LONG_S)

    def published(self, outcome: str) -> float:
        value = self.metrics.registry.get_sample_value("updraft_trainer_publishes_total", {"outcome": outcome})
        return value or 0.0


@asynccontextmanager
async def bench(
    folder: Path,
    target: Path,
    traces: TraceMaker,
    *,
    port: int,
    speculator: str,
    vocab_size: int = 128,
    ranks: Ranks = ALONE,
) -> AsyncIterator[Bench]:
    identity = Identity(
        speculator=speculator,
        target_fingerprint=traces.target_fingerprint,
        tokenizer_fingerprint=traces.tokenizer_fingerprint,
    )
    spec = TrainerSpec(
        target=read_head(target),
        target_fingerprint=traces.target_fingerprint,
        hyper=Hyperparameters(adaptation_rate=1e-3),  # the draft is small
        shape=ShapeChoice(draft_vocab_size=vocab_size),
        first_samples=8,
        seed=0,
        compute=Compute(ranks=ranks),
    )
    channel = CommandChannel(ranks, torch.device("cpu"))
    followers = Followers(ranks, channel if ranks.size > 1 else None)
    clock, metrics = ManualClock(), Metrics(CollectorRegistry())
    limits = ReplayLimits.of(50 * 1024**2)
    async with AsyncExitStack() as stack:
        replay = stack.enter_context(
            Replay.open(
                folder / "replay",
                limits=limits,
                expected=traces.expected,
                cache_bytes=10 * 1024**2,
                fitted_bytes=5 * 1024**2,
            )
        )
        connection = await stack.enter_async_context(rpc.channel(f"127.0.0.1:{port}"))
        stub = registry_pb2_grpc.RegistryStub(connection)
        sizes = usual()
        capacity = Capacity.of(50 * 1024**2, sizes, volume_bytes=sizes.trainer_volume.amount)
        record = LearningRecord(
            replay,
            capacity,
            min_samples=8,
            version_bytes=sizes.version.amount,
            stream_bytes=2**28,
            samples_to_start=8,
        )
        record.throughput = Throughput(device="cpu (1 thread)")
        registry_view = RegistryView(stub, speculator, folder / "drafts", metrics, learning=record.read)
        components = Components(
            replay=replay,
            registry=registry_view,
            evaluator=Evaluator(
                replay,
                registry_view,
                num_samples=ranks.per_rank(NUM_JUDGES),
                lookahead=LOOKAHEAD,
                gather=followers.evidence,
            ),
            publisher=Publisher(
                stub, identity=identity, config_digest="sha256:c", folder=folder / "candidate", clock=clock
            ),
            states=States(folder / "states"),
            record=record,
            monitor=Monitor(metrics, record.throughput, clock),
            demand=DemandMeter(replay, limits, num_held_out=ranks.per_rank(NUM_JUDGES), max_uses=OPTIONS.max_uses),
            metrics=metrics,
            clock=clock,
            check=lambda: None,
            followers=followers,
        )
        yield Bench(
            folder=folder,
            traces=traces,
            replay=replay,
            spec=spec,
            channel=channel,
            identity=identity,
            components=components,
            clock=clock,
            metrics=metrics,
            stub=stub,
        )


async def publish_elsewhere(made: Bench, target: Path, token_ids: Tensor, *, is_target: bool = True) -> None:
    """Somebody else's draft becomes the registry's first version."""
    network = make_draft(target, token_ids=token_ids)
    checkpoint.save(network, made.folder / "elsewhere")
    weights = made.folder / "elsewhere" / checkpoint.WEIGHTS
    specs = checkpoint.tensor_specs(checkpoint.checkpoint_tensors(network))
    manifest = pb.Manifest(
        speculator=made.identity.speculator,
        digest=file_digest(weights),
        size_bytes=weights.stat().st_size,
        tensors=specs,
        tensors_digest=tensors_digest(specs),
        config_json=network.config.to_json(),
        target_fingerprint=made.traces.target_fingerprint if is_target else "sha256:other",
        tokenizer_fingerprint=made.traces.tokenizer_fingerprint,
        draft_vocabulary_fingerprint=checkpoint.vocabulary_fingerprint(network.token_ids),
        source=pb.SOURCE_IMPORTED,
    )
    await transfer.upload(made.stub, manifest, weights)

"""The trainer without its learner: intake and replay, from which batches are read at a steady pace.

The target's tensors (2.5 GB at D 4096, V 151,936) and the learner's state are left out, because this measures the data path.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

from bench.width.traffic import Width
from prometheus_client import CollectorRegistry
from tests.support.checkpoints import TARGET

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_artifacts.sizing import usual
from updraft_chassis import lifecycle, metrics, rpc, streams
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import UpdraftError
from updraft_chassis.streams.consumer import Consumer
from updraft_draft import memory
from updraft_draft.tensors import decoded
from updraft_trainer.data.intake import Intake, storable_together
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.retention import ReplayLimits
from updraft_trainer.data.sample import ExpectedTarget
from updraft_trainer.data.sample_cache import DEFAULT_MAX_BYTES
from updraft_trainer.metrics import Metrics
from updraft_trainer.settings import TrainerSettings

REPLAY_BYTES = 4 * 1024**3
"""Less than an 8B target gets: five minutes write 38 GB, and a replay that is full has to evict too."""

BATCH_S = 1.0
"""Between two batches: a step of an 8B draft takes about as long on an accelerator."""

DEMAND = 1.05
"""Captured tokens asked for, per token that pods generate: those of the prompts count too."""

_CLAIM_IDLE = timedelta(seconds=30)

_DEMAND = "demand_tokens_per_second"
_DEMAND_S = 2.0


async def serve(config: TrainerSettings, stop: lifecycle.Stop) -> None:
    """Store traces, read batches and state the demand until `stop`. Reads go to the file `reads` in the data folder."""
    width = Width(**json.loads(os.environ["WIDTH"]))
    counters, data = Metrics(CollectorRegistry()), config.data_dir
    data.mkdir(parents=True)
    expected = ExpectedTarget(
        target_fingerprint=TARGET,
        tokenizer_fingerprint="",
        aux_size=3 * width.hidden,
        hidden_size=width.hidden,
        vocab_size=width.vocabulary,
    )
    limits = ReplayLimits.of(config.replay_max_bytes or REPLAY_BYTES)
    cache_bytes = config.cache_max_bytes or min(usual().cache.amount, DEFAULT_MAX_BYTES)
    client = streams.connect(config.redis_url.get_secret_value())
    (key,) = config.stream_keys
    consumer = Consumer(client, key, group="trainer", name="trainer", claim_idle=_CLAIM_IDLE)
    with (
        Replay.open(data / "replay", limits=limits, expected=expected, cache_bytes=cache_bytes) as replay,
        metrics.serve(
            counters.registry, host="127.0.0.1", port=config.metrics_port, ready=lambda: True, setting="METRICS_PORT"
        ),
    ):
        intake = Intake(consumer, replay, expected, metrics=counters, clock=SystemClock())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(intake.run(stop))
            tasks.create_task(asyncio.to_thread(_read, replay, data / "reads", config, stop))
            tasks.create_task(_state_demand(config, intake, DEMAND * width.tokens_per_s, stop))
    await client.aclose()


def _read(replay: Replay, path: Path, config: TrainerSettings, stop: lifecycle.Stop) -> None:
    """Read batches as the loop does, and write of each: rows, seconds, seconds of processor time, and seconds for decoding it
    as a learner on a CPU does."""
    uses: Counter[str] = Counter()
    rng = random.Random(0)
    with path.open("w", buffering=1) as lines:
        while not stop.requested:
            began_s, cpu_s = time.perf_counter(), time.thread_time()
            samples = replay.training_batch(uses, max_uses=config.max_uses, rng=rng)
            times = time.perf_counter() - began_s, time.thread_time() - cpu_s
            uses.update(sample.trace_id for sample in samples)
            if samples:
                began_s = time.perf_counter()
                batch = decoded([sample.aux for sample in samples])
                lines.write(f"{json.dumps([len(batch), *times, time.perf_counter() - began_s])}\n")
                del batch
            del samples
            memory.release()
            time.sleep(BATCH_S)


async def _state_demand(config: TrainerSettings, intake: Intake, usable: float, stop: lifecycle.Stop) -> None:
    """Ask for all that the pods generate and intake can store, where the registry takes a demand."""
    stream_bytes = config.capture_max_bytes or usual().stream.amount
    if _DEMAND not in pb.ReportTrainingRequest.DESCRIPTOR.fields_by_name:
        return
    async with rpc.channel(config.registry_address) as channel:
        stub = RegistryStub(channel)
        while not stop.requested:
            request = pb.ReportTrainingRequest(speculator=config.speculator, message="bench")
            try:
                setattr(request, _DEMAND, min(usable, await storable_together([intake], stream_bytes)))
                with rpc.errors():
                    await stub.ReportTraining(request, timeout=_DEMAND_S)
            except UpdraftError:
                pass
            await asyncio.sleep(_DEMAND_S)

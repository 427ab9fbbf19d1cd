"""From 200 requests to a published draft: the real trainer with default settings, on a target of full width.

The target has random weights. Its traffic follows a rule that a draft can learn; see teacher.py for what that shows.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import httpx
import numpy as np
import psutil
from bench.width.traffic import Width
from bench.width.weights import bfloat16
from tests.support.ports import free_port
from tests.support.processes import Process, scrape
from tests.support.redis_server import RedisServer
from tests.support.registry import registry_stub, state
from tests.support.tiny_tokenizer import write_tokenizer

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import safetensors_header
from updraft_chassis import rpc
from updraft_chassis.errors import Unavailable

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

STREAMS = 4
_POLL_S = 2.0
_BUSY = {"vocabulary and closed form": "fit", "estimates": "evaluation", "optimizer steps": "step"}
_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRun:
    """`version` 0: nothing was published in time. Lengths are tokens per verify step on held-out requests."""

    hidden: int
    tokens: int
    requests: int
    """Requests that were answered until the publication."""
    stored: int
    """Requests in the trainer's replay by then."""
    seconds: float
    """From the first request to the publication."""
    version: int
    steps: int
    """Optimizer steps of the published draft."""
    held_out: int
    lookahead: int
    candidate_length: float
    baseline_length: float
    busy_s: Mapping[str, float]
    """The trainer's time by what it did. The rest is waiting for requests, start and upload."""
    trainer_cpu_s: float
    trainer_bytes: int
    """Largest resident size, with the pages of the target that are mapped from its file."""
    anonymous_bytes: int
    """Largest size without them."""
    messages: Sequence[tuple[float, str]]
    """A message of the trainer to the user, and when it came."""

    @property
    def learned_share(self) -> float:
        """Accepted draft tokens per step over the number of draft tokens: the rule leaves nothing to chance."""
        return (self.candidate_length - 1.0) / self.lookahead if self.version else 0.0


@dataclass(slots=True)
class _Observed:
    """Observations of the trainer while it learned."""

    began_s: float
    requests: int = 0
    anonymous_bytes: int = 0
    messages: list[tuple[float, str]] = field(default_factory=list)
    state: pb.SpeculatorState = field(default_factory=pb.SpeculatorState)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began_s

    def see(self, state: pb.SpeculatorState, memory: Mapping[str, int]) -> None:
        self.state = state
        self.anonymous_bytes = max(self.anonymous_bytes, memory.get("RssAnon", 0))
        if not self.messages or self.messages[-1][1] != state.trainer_message:
            self.messages.append((round(self.seconds, 1), state.trainer_message))


async def run(folder: Path, width: Width, *, requests: int, tokens: int, within_s: float) -> LearningRun:
    """Send requests through one pod, and wait for a publication."""
    target = write_target(folder / "target", width)
    redis, port, pod_port, metrics_port = RedisServer(folder), free_port(), free_port(), free_port()
    registry = {
        "UPDRAFT_REGISTRY_DATA_DIR": str(folder / "registry"),
        "UPDRAFT_REGISTRY_PORT": str(port),
        "UPDRAFT_REGISTRY_METRICS_PORT": "0",
    }
    trainer = {
        "UPDRAFT_TRAINER_MODEL": str(target),
        "UPDRAFT_TRAINER_DATA_DIR": str(folder / "trainer"),
        "UPDRAFT_TRAINER_REDIS_URL": redis.url,
        "UPDRAFT_TRAINER_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
        "UPDRAFT_TRAINER_METRICS_PORT": str(metrics_port),
    }
    pod = {
        "UPDRAFT_INFERENCE_MODEL": str(target),
        "UPDRAFT_INFERENCE_SERVED_MODEL_NAME": "wide",
        "UPDRAFT_INFERENCE_PORT": str(pod_port),
        "UPDRAFT_INFERENCE_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
        "UPDRAFT_INFERENCE_REDIS_URL": redis.url,
        "UPDRAFT_INFERENCE_DATA_DIR": str(folder / "pod"),
        "UPDRAFT_INFERENCE_MAX_CONTEXT": str(tokens + 64),
        "WIDTH": json.dumps(asdict(width)),
        "WIDTH_TARGET": str(target),
    }
    with (
        redis,
        Process("updraft_registry", registry, folder / "registry.log") as registry_process,
        Process("updraft_trainer", trainer, folder / "trainer.log") as trainer_process,
        Process("bench.width.pod", pod, folder / "pod.log") as pod_process,
    ):
        registry_process.wait_for_log("Registry serves")
        trainer_process.wait_for_log("Trainer started", timeout_s=300)
        pod_process.wait_for_log("Ready")
        async with rpc.channel(f"127.0.0.1:{port}") as channel:
            observed = _Observed(time.perf_counter())
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(_send(f"http://127.0.0.1:{pod_port}", requests, tokens, observed))
                await _published(registry_stub(channel), trainer_process, observed, within_s)
                run = await _figures(channel, observed, trainer_process.pid, width, tokens, scrape(metrics_port))
                sending.cancel()
            return run


async def _send(url: str, requests: int, tokens: int, observed: _Observed) -> None:
    gate = asyncio.Semaphore(STREAMS)
    async with httpx.AsyncClient(timeout=300.0) as client, asyncio.TaskGroup() as tasks:

        async def complete(number: int) -> None:
            body = {"model": "wide", "prompt": [97 + number % 64], "max_tokens": tokens, "ignore_eos": True}
            async with gate:
                (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()
                observed.requests += 1
                await asyncio.sleep(0.5)  # as fast as a busy server, slower than the data path's limit

        for number in range(requests):
            tasks.create_task(complete(number))


async def _published(stub: "RegistryAsyncStub", trainer: Process, observed: _Observed, within_s: float) -> None:
    """Return once there is a version, or after `within_s`. It polls, because a busy machine may break a long stream."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s and not observed.state.latest:
        await asyncio.sleep(_POLL_S)
        assert trainer.is_running, trainer.log()[-3000:]
        with suppress(Unavailable):
            observed.see(await state(stub), _memory(trainer.pid))


async def _figures(
    channel: grpc.aio.Channel,
    observed: _Observed,
    trainer_pid: int,
    width: Width,
    tokens: int,
    metrics: Mapping[str, float],
) -> LearningRun:
    seconds, latest = observed.seconds, observed.state.latest
    manifest = pb.Manifest()
    if latest:
        with rpc.errors():
            answer = await registry_stub(channel).Get(pb.GetRequest(speculator="default", version=latest))
        manifest = answer.version.manifest
    samples, learning = manifest.evaluation.samples, observed.state.learning
    num_tokens = sum(sample.tokens for sample in samples)
    times = psutil.Process(trainer_pid).cpu_times()
    return LearningRun(
        hidden=width.hidden,
        tokens=tokens,
        requests=observed.requests,
        stored=learning.samples + learning.held_out,
        seconds=seconds,
        version=latest,
        steps=manifest.provenance.step,
        held_out=len(samples),
        lookahead=manifest.evaluation.lookahead,
        candidate_length=num_tokens / max(1, sum(sample.candidate_steps for sample in samples)),
        baseline_length=num_tokens / max(1, sum(sample.baseline_steps for sample in samples)),
        busy_s={name: metrics.get(f"updraft_trainer_{key}_seconds_sum", 0.0) for name, key in _BUSY.items()},
        trainer_cpu_s=times.user + times.system,
        trainer_bytes=_memory(trainer_pid)["VmHWM"],
        anonymous_bytes=observed.anonymous_bytes,
        messages=observed.messages,
    )


def _memory(pid: int) -> dict[str, int]:
    """Sizes in bytes, as Linux names them."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def write_target(folder: Path, width: Width) -> Path:
    """Embedding, head and final norm of a Qwen3-like target, and a tokenizer of 258 tokens."""
    write_tokenizer(folder)
    shape, rng = (width.vocabulary, width.hidden), np.random.default_rng(0)
    shapes = {"lm_head.weight": shape, "model.embed_tokens.weight": shape, "model.norm.weight": (width.hidden,)}
    with (folder / "model.safetensors").open("wb") as file:
        file.write(safetensors_header.header((name, "BF16", shape) for name, shape in shapes.items()))
        for name, (num_rows, *columns) in shapes.items():
            if name == "model.norm.weight":
                file.write(bfloat16(np.ones(num_rows, dtype=np.float32)))
                continue
            for begin in range(0, num_rows, _BLOCK_ROWS):
                rows = rng.standard_normal((min(_BLOCK_ROWS, num_rows - begin), *columns), dtype=np.float32)
                file.write(bfloat16(rows * np.float32(width.hidden**-0.5)))
    heads = max(1, width.hidden // 128)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": width.vocabulary,
        "hidden_size": width.hidden,
        "intermediate_size": 3 * width.hidden,
        "num_hidden_layers": 36,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
        "eos_token_id": 257,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder

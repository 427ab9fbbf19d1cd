"""From 200 requests to a published draft: the real trainer with default settings, on a target of full width.

The target has random weights. Its traffic follows a rule that a draft can learn; see teacher.py for what that shows.
"""

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import httpx
import numpy as np
from bench.width.traffic import Width
from bench.width.weights import bfloat16
from tests.support.ports import free_port
from tests.support.processes import Process
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
_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRun:
    """`version` 0: nothing was published in time. Lengths are tokens per verify step on held-out requests."""

    requests: int
    tokens: int
    seconds: float
    """From the first request to the publication."""
    version: int
    held_out: int
    candidate_length: float
    baseline_length: float
    message: str
    """The trainer's message at the end."""


async def run(folder: Path, width: Width, *, requests: int, tokens: int, within_s: float) -> LearningRun:
    """Send requests through one pod, and wait for a publication."""
    target = _write_target(folder / "target", width)
    redis, port, pod_port = RedisServer(folder), free_port(), free_port()
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
        "UPDRAFT_TRAINER_METRICS_PORT": "0",
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
            began_s = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_send(f"http://127.0.0.1:{pod_port}", requests, tokens))
                published = await _published(registry_stub(channel), within_s)
                seconds = time.perf_counter() - began_s
            return await _figures(channel, published, requests=requests, tokens=tokens, seconds=seconds)


async def _send(url: str, requests: int, tokens: int) -> None:
    gate = asyncio.Semaphore(STREAMS)
    async with httpx.AsyncClient(timeout=300.0) as client, asyncio.TaskGroup() as tasks:

        async def complete(number: int) -> None:
            body = {"model": "wide", "prompt": [97 + number % 64], "max_tokens": tokens, "ignore_eos": True}
            async with gate:
                (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()
                await asyncio.sleep(0.5)  # as fast as a busy server, slower than the data path's limit

        for number in range(requests):
            tasks.create_task(complete(number))


async def _published(stub: "RegistryAsyncStub", within_s: float) -> pb.SpeculatorState:
    """The state once there is a version, or after `within_s`. It is polled, because a busy machine may break a long stream."""
    until_s, known = time.monotonic() + within_s, pb.SpeculatorState()
    while time.monotonic() < until_s and not known.latest:
        await asyncio.sleep(_POLL_S)
        with suppress(Unavailable):
            known = await state(stub)
    return known


async def _figures(
    channel: grpc.aio.Channel, published: pb.SpeculatorState, *, requests: int, tokens: int, seconds: float
) -> LearningRun:
    evaluation = pb.Evaluation()
    if published.latest:
        with rpc.errors():
            answer = await registry_stub(channel).Get(pb.GetRequest(speculator="default", version=published.latest))
        evaluation = answer.version.manifest.evaluation
    num_tokens = sum(sample.tokens for sample in evaluation.samples)
    return LearningRun(
        requests=requests,
        tokens=tokens,
        seconds=seconds,
        version=published.latest,
        held_out=len(evaluation.samples),
        candidate_length=num_tokens / max(1, sum(sample.candidate_steps for sample in evaluation.samples)),
        baseline_length=num_tokens / max(1, sum(sample.baseline_steps for sample in evaluation.samples)),
        message=published.trainer_message,
    )


def _write_target(folder: Path, width: Width) -> Path:
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

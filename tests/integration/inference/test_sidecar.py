"""The agent beside a server whose plugin is the test's: policy, traces in a real Redis, counts in the pod's report, probes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from tests.support.ports import free_port
from tests.support.processes import scrape, total
from tests.support.redis_server import RedisServer
from tests.support.registry import Registry, running
from tests.support.tap_plugin import Process, finished, prefill, process, step
from tests.support.tiny_target import make_tiny_target
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft.trace.v1 import trace_pb2
from updraft_chassis import rpc
from updraft_chassis.lifecycle import Stop
from updraft_inference.settings import InferenceSettings
from updraft_inference.sidecar import composition

NAMES = {"sglang": "SGLang", "vllm": "vLLM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    settings: InferenceSettings
    registry: Registry
    stop: Stop

    async def metric(self, name: str) -> float:
        """Summed over labels."""
        return total(await asyncio.to_thread(scrape, self.settings.metrics_port), f"updraft_inference_{name}")

    async def status(self, path: str) -> int:
        async with httpx.AsyncClient(timeout=60) as http:
            try:
                return (await http.get(f"http://127.0.0.1:{self.settings.metrics_port}{path}")).status_code
            except httpx.TransportError:
                return 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_target(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def sidecar(
    folder: Path, model: Path, redis_url: str, engine: Literal["sglang", "vllm"]
) -> AsyncIterator[Sidecar]:
    async with running(folder) as registry, asyncio.TaskGroup() as tasks:
        settings = InferenceSettings(
            model=model,
            engine=engine,
            metrics_port=free_port(),
            data_dir=folder / "data",
            redis_url=SecretStr(redis_url),
            registry_address=registry.address,
            report_seconds=0.05,
            pod_name="pod-0",
            capture_evaluation_fraction=0.0,
            capture_prompt_rows=7,
        )
        one = Sidecar(settings=settings, registry=registry, stop=Stop())
        serving = tasks.create_task(composition.serve(settings, one.stop))
        try:
            await until(lambda: _is_ready(one), what="readiness")
            yield one
        finally:
            one.stop.request()
            await serving


async def _is_ready(one: Sidecar) -> bool:
    return await one.status("/readyz") == 200


async def server(stack: AsyncExitStack, one: Sidecar) -> tuple[Process, Process]:
    """Both processes, which have heard the policy."""
    path, name = one.settings.socket_path, NAMES[one.settings.engine]
    both = [
        await stack.enter_async_context(process(path, role, engine={"name": name, "version": "1.2.3"}))
        for role in ("scheduler", "worker")
    ]
    for each in both:
        assert (await each.hear())["refusal"] == ""
        policy = await each.hear()
        assert (policy["kind"], policy["payload"], policy["prompt_rows"]) == ("policy", 1.0, 7)
        await each.say({**policy, "number": 1, "dropped": 0})
    return both[0], both[1]


async def traces(redis: Redis, settings: InferenceSettings) -> list[trace_pb2.Trace]:
    entries: list[Any] = [entry for key in settings.stream_keys for entry in await redis.xrange(key) or ()]
    return [trace_pb2.Trace.FromString(next(iter(fields.values()))) for _, fields in entries]


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
async def test_it_is_ready_without_a_server_and_a_servers_requests_become_traces_and_counts(
    model: Path, short_tmp_path: Path, redis_server: RedisServer, redis: Redis, engine: Literal["sglang", "vllm"]
) -> None:
    async with sidecar(short_tmp_path, model, redis_server.url, engine) as one, AsyncExitStack() as stack:
        assert (await one.status("/healthz"), await one.status("/v1/models")) == (200, 404)
        scheduler, worker = await server(stack, one)
        await worker.say(*prefill("a", 4))
        await worker.say(*step("a", 4, 1))
        await scheduler.say(*finished("a", 4, 3))
        await scheduler.say(*finished("b", 5, 2, captured=False))

        async def is_stored() -> bool:
            return len(await traces(redis, one.settings)) == 1

        await until(is_stored, what="the trace")
        (trace,) = await traces(redis, one.settings)
        async with rpc.channel(one.registry.address) as channel:
            stub = RegistryStub(channel)

            async def is_counted() -> bool:
                answer = await stub.List(pb.ListRequest(speculator="default"), timeout=60)
                return [(found.pods.connected, found.capture_problem) for found in answer.speculators] == [(1, "")]

            await until(is_counted, what="the pod in the registry")
        assert await one.metric("requests_total") == 2
        assert await one.metric("verify_steps_total") == 2
        assert await one.metric("accepted_tokens_total") == 2
        assert await one.metric("captured_traces_total") == 1

    assert list(trace.prompt_ids) == [0, 1, 2, 3]
    assert list(trace.output_ids) == [4, 5, 6]
    assert (trace.header.engine, trace.header.payload_probability) == (f"{engine}/1.2.3", 1.0)
    assert (list(trace.payload.missing_rows), trace.header.sampling.temperature) == ([], 0.5)
    assert not one.settings.socket_path.exists()

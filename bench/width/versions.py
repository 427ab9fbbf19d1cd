"""From a publication to its use: the real registry, and pods that fetch, verify and load with the agent's own code."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from bench.fleet.usage import measured
from bench.width import standstill
from bench.width.processes import WatchedProcess
from bench.width.standstill import Standstill
from bench.width.weights import DraftFile
from tests.support.ports import free_port
from tests.support.processes import scrape
from tests.support.registry import registry_stub
from tests.support.tiny_tokenizer import write_tokenizer

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import transfer
from updraft_chassis import rpc

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRun:
    """One version, from the start of its upload until every pod has reported that it serves it."""

    pods: int
    version: int
    weights_bytes: int
    upload_s: float
    seconds: float
    registry_cpu_s: float
    registry_bytes: int
    """Peak resident memory, from the kernel."""
    pod_bytes: int
    """Largest resident memory of a pod, tensors included, sampled twice per second."""
    sent_bytes: float
    """By the registry."""
    longest: dict[str, Standstill]


@asynccontextmanager
async def fleet(folder: Path, num_pods: int, **settings: object) -> AsyncIterator["WidthFleet"]:
    """A new registry, and pods that are connected to it."""
    port, metrics_port = free_port(), free_port()
    values = {"data_dir": folder / "registry", "port": port, "metrics_port": metrics_port, "strategy": "Immediate"}
    variables = {f"UPDRAFT_REGISTRY_{name.upper()}": str(value) for name, value in (values | settings).items()}
    model = write_tokenizer(folder / "tiny")
    with ExitStack() as running:
        registry = running.enter_context(WatchedProcess("registry", folder / "registry-process", variables))
        registry.wait_for_log("Registry serves")
        pods = []
        for number in range(num_pods):
            variables = {
                "UPDRAFT_INFERENCE_MODEL": str(model),
                "UPDRAFT_INFERENCE_PORT": "0",
                "UPDRAFT_INFERENCE_POD_NAME": f"pod-{number}",
                "UPDRAFT_INFERENCE_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
                "UPDRAFT_INFERENCE_DATA_DIR": str(folder / f"pod-{number}"),
                "WIDTH": json.dumps({"hidden": 64, "vocabulary": 151_936, "tokens_per_s": 0.0}),
            }
            pods.append(running.enter_context(WatchedProcess("pod", folder / f"pod-{number}-process", variables)))
        for pod in pods:
            pod.wait_for_log("Ready")
        async with rpc.channel(f"127.0.0.1:{port}") as channel:
            yield WidthFleet(registry, pods, metrics_port, registry_stub(channel))


class WidthFleet:
    """A registry and its pods."""

    def __init__(
        self, registry: WatchedProcess, pods: list[WatchedProcess], metrics_port: int, stub: "RegistryAsyncStub"
    ) -> None:
        self._registry = registry
        self._pods = pods
        self._metrics_port = metrics_port
        self._stub = stub

    async def roll_out(self, draft: DraftFile) -> VersionRun:
        """Publish a version as a trainer does, and wait until all pods serve it."""
        since_s, sent = time.time(), self._sent()
        with measured(psutil.Process(self._registry.pid)) as usage:
            began_s = time.perf_counter()
            answer = await transfer.upload(self._stub, draft.manifest, draft.path)
            upload_s = time.perf_counter() - began_s
            number = answer.version.version
            await self._until_served(number)
        await asyncio.sleep(1.0)  # the last lines of the watches
        registry = self._registry.watched(since_s)
        pods = [second for pod in self._pods for second in pod.watched(since_s)]
        return VersionRun(
            pods=len(self._pods),
            version=number,
            weights_bytes=draft.manifest.size_bytes,
            upload_s=upload_s,
            seconds=usage.seconds,
            registry_cpu_s=usage.registry_cpu_s,
            registry_bytes=usage.peak_bytes,
            pod_bytes=max(second.resident_bytes for second in pods),
            sent_bytes=self._sent() - sent,
            longest={
                "registry": standstill.most([second.longest for second in registry]),
                "pods": standstill.most([second.longest for second in pods]),
            },
        )

    async def _until_served(self, number: int) -> None:
        with rpc.errors():
            async for response in self._stub.Watch(pb.WatchRequest(speculator="default"), timeout=TIMEOUT_S):
                state = response.state
                if (state.stable, state.pods.serving_stable) == (number, len(self._pods)):
                    return

    def _sent(self) -> float:
        page = scrape(self._metrics_port)
        return sum(value for name, value in page.items() if name.startswith("updraft_registry_fetched_bytes_total"))

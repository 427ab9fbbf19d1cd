"""Stands in for the kubelet, the servers and the agents of an SGLang speculator, on a real API server with a real registry.

A server is built for the sizes that its pod's template has when the pod is made. Its agent loads drafts of these sizes, and
waits when it is told to serve another one, as the product's does.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

import grpc.aio
from tests.cluster.access import Json
from tests.cluster.operator.registries import Shelf
from tests.cluster.operator.subject import Subject, running

from updraft.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from updraft_chassis import rpc
from updraft_operator.api import names
from updraft_operator.manifests.servers import server

Stream: TypeAlias = "grpc.aio.StreamStreamCall[fleet_pb2.ConnectRequest, fleet_pb2.ConnectResponse]"

_LOOK_S = 0.1
_START_LOOKS = 15
"""How often a new pod is looked at until it is ready."""
_REPORT_S = 0.5


class SglangPods:
    """Observations of a speculator's serving pods; get it from `sglang_pods`."""

    def __init__(self, subject: Subject, shelf: Shelf, target: str) -> None:
        self.built_for = dict[str, str]()
        """The draft's config.json in the template of each pod that there ever was; empty: the sizes of the spec."""
        self.num_ready = list[int]()
        """At each look."""
        self.conditions = set[tuple[str, str]]()
        """Statuses of FullyScaled, with their reasons."""
        self._subject, self._shelf, self._target = subject, shelf, target
        self._stopping = threading.Event()

    @property
    def now(self) -> list[str]:
        """The config that each pod was built for, of those that exist now."""
        return [self.built_for[pod["metadata"]["name"]] for pod in self._pods() if _name(pod) in self.built_for]

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        """Until `stop`."""
        async with asyncio.TaskGroup() as tasks:
            await self._look_after(tasks)

    async def _look_after(self, tasks: asyncio.TaskGroup) -> None:
        agents, looks = dict[str, asyncio.Task[None]](), dict[str, int]()
        while not self._stopping.is_set():
            pods = {_name(pod): pod for pod in await asyncio.to_thread(self._pods)}
            for name in agents.keys() - pods.keys():
                agents.pop(name).cancel()
            for name, pod in pods.items():
                looks[name] = looks.get(name, 0) + 1
                self.built_for.setdefault(name, server.draft_config_of(pod["spec"]))
                if looks[name] == _START_LOOKS:
                    await asyncio.to_thread(self._subject.set_pod, name, running(pod))
                    agents[name] = tasks.create_task(self._agent(name))
            self.num_ready.append(len(agents))
            self.conditions.add(await asyncio.to_thread(self._subject.condition, "FullyScaled"))
            await asyncio.sleep(_LOOK_S)
        for task in agents.values():
            task.cancel()

    def _pods(self) -> list[Json]:
        return self._subject.pods(names.SERVING)

    async def _agent(self, name: str) -> None:
        identity = fleet_pb2.PodIdentity(
            speculator=self._subject.name,
            pod=name,
            engine="sglang/test",
            target_fingerprint=self._target,
            boot_id=f"boot of {name}",
        )
        report = fleet_pb2.PodReport(identity=identity)
        async with rpc.channel(self._shelf.address) as channel, asyncio.TaskGroup() as tasks:
            stub: fleet_pb2_grpc.FleetAsyncStub = fleet_pb2_grpc.FleetStub(channel)
            call, news = stub.Connect(), asyncio.Event()
            tasks.create_task(self._follow(name, call, report, news))
            while True:
                await call.write(fleet_pb2.ConnectRequest(report=report))
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), _REPORT_S)
                news.clear()

    async def _follow(self, name: str, call: Stream, report: fleet_pb2.PodReport, news: asyncio.Event) -> None:
        async for answer in call:
            await asyncio.to_thread(self._obey, name, answer.directive, report)
            news.set()
        raise AssertionError("the registry ended the stream")

    def _obey(self, name: str, order: fleet_pb2.Directive, report: fleet_pb2.PodReport) -> None:
        report.status.Clear()
        report.status.nonce, report.status.version = order.nonce, order.serve_version
        manifest = self._shelf.versions()[order.serve_version].manifest if order.serve_version else None
        if manifest is not None and sizes(manifest.config_json) != sizes(self.built_for[name]):
            report.status.outcome, report.status.needs_restart = fleet_pb2.OUTCOME_PENDING, True
            report.status.reason = "it has another shape than the draft that the server started with"
            return
        report.status.outcome = fleet_pb2.OUTCOME_ACK
        digest = "" if manifest is None else manifest.tensors_digest
        report.loaded.CopyFrom(fleet_pb2.Loaded(version=order.serve_version, tensors_digest=digest))


def sizes(config_json: str) -> tuple[int, ...]:
    """The sizes that a server fixes at start; empty for a pod with the sizes of its spec, which no draft of a test has."""
    content = json.loads(config_json or "{}")
    return tuple(content[key] for key in ("hidden_size", "draft_vocab_size", "intermediate_size") if key in content)


@contextmanager
def sglang_pods(subject: Subject, shelf: Shelf, target: str) -> Iterator[SglangPods]:
    """Let the speculator's pods, those there are and those that come, start and follow the registry. `target`: its
    fingerprint."""
    pods, failures = SglangPods(subject, shelf, target), list[BaseException]()

    def run() -> None:
        try:
            asyncio.run(pods.run())
        except BaseException as error:  # noqa: BLE001 - told in the test's thread
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield pods
    finally:
        pods.stop()
        thread.join()
    if failures:
        raise failures[0]


def _name(pod: Json) -> str:
    return str(pod["metadata"]["name"])

"""Certificates and CAs change every few seconds under calls and a stream of a real registry, and nobody notices."""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tests.support.manifests import CONFIG
from tests.support.mounts import Mount
from tests.support.registry import RegistryProcess
from tests.unit.operator.world import KEY, World, run_now

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Unavailable
from updraft_operator.manifests.tls.terms import Lives, Tls, TlsMode
from updraft_rollouts.policy import Analysis, RolloutPolicy

LIVES = Lives(ca_s=60.0, certificate_s=15.0)
"""A certificate lasts ten seconds, and another five in case that this machine is busy; a CA signs after 2.5 seconds."""

FORMER_CA_S = 38.0
"""Age of the first CA at the start: it is succeeded after two seconds, and ends after 22."""

LONG_ENOUGH_S = 32.0
HOST = "qwen-registry.team.svc"


class Kubelet:
    """Keeps the files of a registry and of its clients up to date."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self.server, self.client = Mount(folder / "server"), Mount(folder / "client")

    def sync(self) -> None:
        secret = self._world.cluster.objects["Secret", KEY.namespace, "qwen-registry-tls"]["data"]
        decoded = {entry: base64.b64decode(value).decode() for entry, value in secret.items()}
        self.server.sync({entry: decoded[entry] for entry in ("tls.crt", "tls.key")})
        self.client.sync(self._world.cluster.objects["ConfigMap", KEY.namespace, "qwen-ca"]["data"])


@dataclass
class Outcome:
    num_calls: int = 0
    failures: list[str] = field(default_factory=list)

    async def repeat(self, call: Callable[[], Awaitable[object]], end: asyncio.Event) -> None:
        while not end.is_set():
            try:
                await call()
                self.num_calls += 1
            except Unavailable as error:
                self.failures.append(str(error))
            await asyncio.sleep(0.05)


class Operator:
    """One that watches resource team/qwen, and looks at it all the time."""

    def __init__(self, kubelet_folder: Path) -> None:
        self._world = World(replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, lives=LIVES)))
        _set_clock(self._world, time.time() - FORMER_CA_S)
        run_now(self._world.certificates.refresh())
        _set_clock(self._world, time.time())
        self._world.settle()
        self.kubelet = Kubelet(self._world, kubelet_folder)
        self.kubelet.sync()

    async def run(self, end: asyncio.Event) -> None:
        while not end.is_set():
            _set_clock(self._world, time.time())
            await self._world.certificates.refresh()
            await self._world.reconciler.reconcile(KEY)
            self.kubelet.sync()
            await asyncio.sleep(0.2)


def _set_clock(world: World, unix_s: float) -> None:
    world.clock.advance(unix_s - world.clock.now())


@pytest.mark.attack(
    boundary="registry",
    attack="certificates and their CA renewed every few seconds under calls and a stream",
    outcome="no call fails, and the stream goes on",
)
async def test_no_call_fails_and_no_stream_ends_while_certificates_and_cas_rotate(tmp_path: Path) -> None:
    operator, kept, fresh, end = Operator(tmp_path), Outcome(), Outcome(), asyncio.Event()
    kubelet = operator.kubelet
    credentials = Credentials(ca_file=tmp_path / "client" / "ca.crt", server_name=HOST)
    files = {"tls_cert_file": tmp_path / "server" / "tls.crt", "tls_key_file": tmp_path / "server" / "tls.key"}
    with RegistryProcess(tmp_path, **files) as registry:

        async def call_anew() -> None:
            async with rpc.channel(registry.address, credentials) as another:
                with rpc.errors():
                    await RegistryStub(another).List(pb.ListRequest(), timeout=30)

        async with rpc.channel(registry.address, credentials) as channel:
            stub = RegistryStub(channel)

            async def call() -> None:
                with rpc.errors():
                    await stub.List(pb.ListRequest(), timeout=30)

            states = aiter(stub.Watch(pb.WatchRequest(speculator="qwen")))
            await anext(states)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(operator.run(end))
                tasks.create_task(kept.repeat(call, end))
                tasks.create_task(fresh.repeat(call_anew, end))
                await asyncio.sleep(LONG_ENOUGH_S)
                end.set()
            policy = RolloutPolicy(analysis=Analysis(min_samples=4321)).to_proto()
            with rpc.errors():
                await stub.SetPolicy(pb.SetPolicyRequest(speculator="qwen", policy=policy), timeout=30)
                async for news in states:  # the stream of the first certificate
                    if news.state.policy == policy:
                        break

        assert (kept.failures, fresh.failures) == ([], [])
        assert min(kept.num_calls, fresh.num_calls) > 20
        assert len(kubelet.server.versions) >= 4
        bundles = [version["ca.crt"] for version in kubelet.client.versions]
        assert len(bundles) >= 3, "one CA, both, and the new one"
        first, last = bundles[0], bundles[-1]
        assert first not in last, "the first CA has ended"
        former = Credentials(authorities=first.encode(), server_name=HOST)
        async with rpc.channel(registry.address, former) as outdated:
            with pytest.raises(Unavailable), rpc.errors():
                await RegistryStub(outdated).List(pb.ListRequest(), timeout=5)

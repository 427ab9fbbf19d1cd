"""Certificates and their CA change under calls and a stream of a real registry, and nobody notices."""

import base64
import time
from dataclasses import replace
from pathlib import Path

import pytest
from grpc.aio import Channel
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

LIVES = Lives(ca_s=24 * 3600.0, certificate_s=4 * 3600.0)
"""Certificates of the test are valid now, although the operator makes them in the past, hours apart."""

HOST = "qwen-registry.team.svc"


class Kubelet:
    """Keeps the files of a registry and of its clients up to date."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self.server, self.client = Mount(folder / "server"), Mount(folder / "client")

    def sync_server(self) -> None:
        secret = self._world.cluster.objects["Secret", KEY.namespace, "qwen-registry-tls"]["data"]
        decoded = {entry: base64.b64decode(value).decode() for entry, value in secret.items()}
        self.server.sync({entry: decoded[entry] for entry in ("tls.crt", "tls.key")})

    def sync_client(self) -> None:
        self.client.sync(self._world.cluster.objects["ConfigMap", KEY.namespace, "qwen-ca"]["data"])


class Operator:
    """One that manages resource team/qwen, and looks at it when a test says so."""

    def __init__(self, folder: Path) -> None:
        self._world = World(replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, lives=LIVES)))
        self._started_s = time.time()
        self.kubelet = Kubelet(self._world, folder)

    def look(self, hours_ago: float) -> None:
        self._world.clock.advance(self._started_s - 3600 * hours_ago - self._world.clock.now())
        run_now(self._world.certificates.refresh())
        self._world.settle()

    @property
    def authorities(self) -> str:
        return self._world.certificates.authorities


@pytest.mark.attack(
    boundary="registry",
    attack="certificates and their CA renewed under calls and a stream",
    outcome="no call fails, and the stream goes on",
)
async def test_no_call_fails_and_no_stream_ends_while_certificates_and_cas_rotate(tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    operator.look(hours_ago=20)
    first, kubelet = operator.authorities, operator.kubelet
    operator.look(hours_ago=3.5)
    kubelet.sync_server()
    kubelet.client.sync({"ca.crt": first})
    credentials = Credentials(ca_file=tmp_path / "client" / "ca.crt", server_name=HOST)
    files = {"tls_cert_file": tmp_path / "server" / "tls.crt", "tls_key_file": tmp_path / "server" / "tls.key"}
    with RegistryProcess(tmp_path, **files) as registry:

        async def call(channel: Channel) -> None:
            with rpc.errors():
                await RegistryStub(channel).List(pb.ListRequest(), timeout=60)

        async def call_anew() -> None:
            async with rpc.channel(registry.address, credentials) as another:
                await call(another)

        async with rpc.channel(registry.address, credentials) as channel:
            states = aiter(RegistryStub(channel).Watch(pb.WatchRequest(speculator="qwen")))
            await anext(states)
            assert operator.authorities.count("BEGIN CERTIFICATE") == 2, "one has been made, and does not sign yet"
            await call_anew()  # it has not heard of the new CA
            kubelet.sync_client()
            await call(channel)
            await call_anew()
            operator.look(hours_ago=0.5)
            kubelet.sync_server()
            await call(channel)
            await call_anew()
            policy = RolloutPolicy(analysis=Analysis(min_samples=4321)).to_proto()
            with rpc.errors():
                await RegistryStub(channel).SetPolicy(pb.SetPolicyRequest(speculator="qwen", policy=policy), timeout=60)
                async for news in states:  # the stream of the first certificate
                    if news.state.policy == policy:
                        break

        assert len(kubelet.server.versions) == 2
        former = Credentials(authorities=first.encode(), server_name=HOST)
        async with rpc.channel(registry.address, former) as outdated:
            with pytest.raises(Unavailable), rpc.errors():
                await RegistryStub(outdated).List(pb.ListRequest(), timeout=5)

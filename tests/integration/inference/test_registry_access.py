"""A whole pod and a whole registry that asks for certificates and tokens."""

import logging
from pathlib import Path
from typing import Any

import pytest
from tests.support.certificates import Authority
from tests.support.inference import running_pod
from tests.support.registry import Registry, running
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Forbidden, InvalidInput, Unavailable
from updraft_registry.settings import RegistrySettings

READER, POD, PERSON = "token-of-a-reader", "token-of-this-pod", "token-of-a-person"


class Guarded:
    """The files of a registry that lets nobody in without a certificate and a token, and of who wants in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers, self._clients = Authority(folder / "servers"), Authority(folder / "clients")
        self.tokens_file = folder / "tokens"
        self.tokens_file.write_text(f"read:{READER}\nserve:{POD}\noperate:{PERSON}\n")

    @property
    def settings(self) -> dict[str, Any]:
        """Of the registry."""
        tls = self._servers.server(clients=self._clients)
        return {
            "tls_cert_file": tls.cert_file,
            "tls_key_file": tls.key_file,
            "tls_client_ca_file": tls.client_ca_file,
            "tokens_file": self.tokens_file,
        }

    def client(self, token: str) -> Credentials:
        """Of who has this token; the same file each time."""
        file = self._folder / "token"
        file.write_text(token)
        return self._clients.client(servers=self._servers, token_file=file)

    def pod(self, token: str) -> dict[str, Any]:
        """Settings of a pod that has this token."""
        mine = self.client(token)
        return {
            "registry_token_file": mine.token_file,
            "registry_ca_file": mine.ca_file,
            "registry_cert_file": mine.cert_file,
            "registry_key_file": mine.key_file,
        }


@pytest.fixture
def guarded(tmp_path: Path) -> Guarded:
    return Guarded(tmp_path)


async def pods(registry: Registry, credentials: Credentials) -> int:
    """How many are connected."""
    async with rpc.channel(registry.address, credentials) as channel:
        with rpc.errors():
            listed = await RegistryStub(channel).List(pb.ListRequest(speculator="default"), timeout=30)
    return listed.speculators[0].pods.connected


async def test_a_pod_that_is_refused_serves_on_says_why_and_connects_once_its_token_does(
    guarded: Guarded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(tmp_path, **guarded.settings) as registry:
        values = guarded.pod(READER)
        async with running_pod(tmp_path, registry_address=registry.address, **values) as pod:
            assert (await pod.complete()).status_code == 200
            assert await pod.metric("updraft_inference_registry_denials_total") >= 1
            assert await pod.metric("updraft_inference_registry_connected") == 0
            denied = 'updraft_registry_denied_calls_total{status="PERMISSION_DENIED"}'
            assert registry.metric(denied) >= 1

            person = guarded.client(PERSON)
            guarded.client(POD)
            await pod.counts("updraft_inference_registry_connected", 1)
            guarded.client(PERSON)
            await until(lambda: _is_one(registry, person), what="the pod in the registry's eyes")

    refused = [
        record for record in caplog.records if record.message == "The registry refuses this pod; serving goes on"
    ]
    assert len(refused) == 1
    assert "role read may not call Fleet.Connect" in str(vars(refused[0]))
    for record in caplog.records:
        assert not any(token in str(vars(record)) for token in (READER, POD, PERSON))


async def _is_one(registry: Registry, credentials: Credentials) -> bool:
    return await pods(registry, credentials) == 1


async def test_a_person_may_set_a_policy_and_a_pod_may_not(guarded: Guarded, tmp_path: Path) -> None:
    async def set_policy(credentials: Credentials | None) -> None:
        request = pb.SetPolicyRequest(speculator="default", policy=pb.RolloutPolicy(strategy=pb.STRATEGY_MANUAL))
        async with rpc.channel(registry.address, credentials) as channel:
            with rpc.errors():
                await RegistryStub(channel).SetPolicy(request, timeout=30)

    async with running(tmp_path, **guarded.settings) as registry:
        with pytest.raises(
            Forbidden, match=r"role serve may not call Registry\.SetPolicy, which requires role operate"
        ):
            await set_policy(guarded.client(POD))
        await set_policy(guarded.client(PERSON))
        with pytest.raises(Unavailable):
            await set_policy(None)


async def test_a_registry_says_at_its_start_what_it_leaves_open(
    guarded: Guarded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(tmp_path / "open"):
        pass
    assert "every client may call everything" in caplog.text

    caplog.clear()
    async with running(tmp_path / "plain", tokens_file=guarded.tokens_file):
        pass
    assert "tokens are sent in plaintext" in caplog.text

    caplog.clear()
    async with running(tmp_path / "guarded", **guarded.settings):
        pass
    assert "UPDRAFT_REGISTRY_T" not in caplog.text


def test_half_a_certificate_is_refused(guarded: Guarded, tmp_path: Path) -> None:
    for name in ("tls_cert_file", "tls_key_file", "tls_client_ca_file"):
        settings = RegistrySettings(data_dir=tmp_path, **{name: guarded.settings[name]})
        with pytest.raises(InvalidInput, match="UPDRAFT_REGISTRY_TLS_CERT_FILE and UPDRAFT_REGISTRY_TLS_KEY_FILE"):
            assert settings.tls

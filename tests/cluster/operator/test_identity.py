"""A registry with the settings that the operator gave it, called with tokens that the real API server issued."""

from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.own_registries import bearing, own_registry, pod_of, token
from tests.cluster.operator.subject import Subject
from tests.support.checkpoints import draft
from tests.support.ports import free_port
from tests.support.registry import PodStream, RegistryProcess, publish, registry_stub
from tests.support.wait import wait_until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.errors import Forbidden, Unauthenticated
from updraft_operator.api import names

_CALL_S = 30


@pytest.fixture(scope="module")
def port() -> int:
    """The registry's port, which the operator must know before the registry exists."""
    return free_port()


@pytest.fixture(scope="module")
def settings(port: int) -> dict[str, object]:
    return {"registry_address": f"127.0.0.1:{port}"}


@pytest.fixture
def registry(operator: Running, subject: Subject, port: int, tmp_path: Path) -> Iterator[RegistryProcess]:
    """The registry of the speculator."""
    subject.create(rollout={"strategy": "Immediate"})
    subject.wait_until_built()
    with own_registry(operator.cluster, subject, port, tmp_path) as process:
        yield process


async def listed(channel: grpc.aio.Channel, speculator: str) -> list[int]:
    with rpc.errors():
        answer = await registry_stub(channel).List(pb.ListRequest(speculator=speculator), timeout=_CALL_S)
    return [each.version for each in answer.versions]


async def connected(channel: grpc.aio.Channel, speculator: str, pod: str) -> None:
    """Until the registry has answered the pod's first report."""
    stream = PodStream(channel, pod)
    stream.identity.speculator = speculator
    await stream.report()
    await stream.receive()


async def test_operator_trainer_and_pods_work_with_tokens_of_the_api_server(
    registry: RegistryProcess, subject: Subject
) -> None:
    subject.wait_for("RegistryReady", "True", "Connected")

    async with bearing(registry, token(subject, names.TRAINER)) as trainer:
        await publish(registry_stub(trainer), draft(seed=1), speculator=subject.name)
    wait_until(lambda: subject.exists("DraftVersion", f"{subject.name}-v1"), what="the version's object")

    pod = str(pod_of(subject, names.SERVING)["metadata"]["name"])
    async with bearing(registry, token(subject, names.SERVING)) as serving:
        await connected(serving, subject.name, pod)
        with pytest.raises(Forbidden, match=f"the token belongs to pod {pod}"):
            await connected(serving, subject.name, f"{pod}-other")
        with pytest.raises(Forbidden, match=r"role serve may not call Registry\.Publish"):
            await publish(registry_stub(serving), draft(seed=2), speculator=subject.name)
    assert registry.metric('updraft_registry_key_fetches_total{result="failed"}') == 0


@pytest.mark.attack(
    boundary="tenants",
    attack="a token for the API server, or of another account, shown to a registry",
    outcome="UNAUTHENTICATED",
)
async def test_tokens_for_others_are_refused(registry: RegistryProcess, subject: Subject) -> None:
    audience = f"updraft-registry/{subject.namespace}/{subject.name}"
    async with bearing(registry, token(subject, names.REGISTRY)) as for_the_api_server:
        with pytest.raises(Unauthenticated, match=f"is for another audience than {audience}"):
            await listed(for_the_api_server, subject.name)
    default = subject.path("ServiceAccount", "default", "token")
    strangers = subject.api.create(default, {"spec": {"audiences": [audience]}})["status"]["token"]
    async with bearing(registry, strangers) as stranger:
        with pytest.raises(Unauthenticated, match=f"'{subject.namespace}:default' has no role in this registry"):
            await listed(stranger, subject.name)


async def test_a_person_who_may_request_tokens_operates_with_the_speculators_account(
    operator: Running, registry: RegistryProcess, subject: Subject
) -> None:
    audience = f"updraft-registry/{subject.namespace}/{subject.name}"
    words = ("create", "token", subject.name, "--namespace", subject.namespace, f"--audience={audience}")
    async with bearing(registry, operator.cluster.kubectl(*words).strip()) as person:
        published = await publish(registry_stub(person), draft(seed=1), speculator=subject.name)
        assert published.version.version == 1
        with rpc.errors():
            request = pb.RetainRequest(speculator=subject.name, version=1, retain=True)
            await registry_stub(person).Retain(request, timeout=_CALL_S)
        assert await listed(person, subject.name) == [1]

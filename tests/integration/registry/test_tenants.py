"""Tenants over gRPC: the salt that pods get, orders to forget, and which versions learned from whom."""

from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from tests.support.checkpoints import draft
from tests.support.registry import CALL_S, PodStream, client, publish, running

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.errors import InvalidInput, NotFound
from updraft_chassis.tenants import hashes
from updraft_registry.api import tenants

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

ACME, RIVAL = 2**64 - 1, 7


async def forget(stub: "RegistryAsyncStub", **tenant: int | str) -> pb.ForgetTenantResponse:
    request = pb.ForgetTenantRequest(speculator="default", **tenant)  # type: ignore[arg-type] # name or hash
    return await stub.ForgetTenant(request, timeout=CALL_S)


async def listed(stub: "RegistryAsyncStub", **tenant: int | str) -> pb.ListTenantsResponse:
    request = pb.ListTenantsRequest(speculator="default", **tenant)  # type: ignore[arg-type] # name or hash
    return await stub.ListTenants(request, timeout=CALL_S)


async def salt_of(channel: grpc.aio.Channel, name: str) -> bytes:
    """The salt that a pod of this name is sent."""
    pod = PodStream(channel, name)
    await pod.report()
    directive = await pod.receive()
    await pod.end()
    return directive.tenant_salt


async def test_all_pods_get_one_salt_and_names_are_hashed_with_it(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    salts = {await salt_of(channel, name) for name in ("pod-0", "pod-1")}

    (salt,) = salts
    assert len(salt) == 32
    forgotten = await forget(stub, name=" acme ")
    assert forgotten.tenant.hash == hashes.keyed(hashes.digest("acme"), salt)
    assert salt.hex() not in str(await stub.List(pb.ListRequest(), timeout=CALL_S)), "readers cannot guess names"


async def test_versions_are_found_by_the_tenant_that_they_learned_from(stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1), provenance=pb.Provenance(tenants=[RIVAL]))
    await publish(stub, draft(2), provenance=pb.Provenance(tenants=[RIVAL, ACME]))
    await publish(stub, draft(3), provenance=pb.Provenance(tenants=[RIVAL], has_more_tenants=True))

    everyone = await listed(stub)
    assert {one.hash: list(one.versions) for one in everyone.tenants} == {RIVAL: [1, 2, 3], ACME: [2]}
    assert everyone.incomplete_versions == [3]
    (unknown,) = (await listed(stub, name="nobody")).tenants
    assert (list(unknown.versions), unknown.forgotten_unix_ms) == ([], 0)
    whole = await stub.Get(pb.GetRequest(speculator="default", version=2), timeout=CALL_S)
    assert list(whole.version.manifest.provenance.tenants) == [RIVAL, ACME]
    short = await stub.List(pb.ListRequest(speculator="default"), timeout=CALL_S)
    assert not any(version.manifest.provenance.tenants for version in short.versions)


async def test_an_order_is_kept_over_a_restart_and_done_when_the_trainer_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as registry, client(registry.address) as stub:
        await publish(stub, draft(1), provenance=pb.Provenance(tenants=[ACME]))
        first = (await forget(stub, hash=ACME)).tenant
        assert (list(first.versions), first.is_deleted) == ([1], False)
        again = (await forget(stub, hash=ACME)).tenant
        assert again.forgotten_unix_ms > first.forgotten_unix_ms

    async with running(tmp_path) as registry, client(registry.address) as stub:
        orders = await stub.ListForgotten(pb.ListForgottenRequest(speculator="default"), timeout=CALL_S)
        assert [(one.hash, one.unix_ms) for one in orders.tenants] == [(ACME, again.forgotten_unix_ms)]
        state = (await stub.List(pb.ListRequest(speculator="default"), timeout=CALL_S)).speculators[0]
        assert state.forgotten_unix_ms == again.forgotten_unix_ms
        for done_ms, is_deleted in ((first.forgotten_unix_ms, False), (again.forgotten_unix_ms, True)):
            learning = pb.Learning(forgotten_unix_ms=done_ms)
            report = pb.ReportTrainingRequest(speculator="default", message="trains", learning=learning)
            await stub.ReportTraining(report, timeout=CALL_S)
            (tenant,) = (await listed(stub)).tenants
            assert tenant.is_deleted is is_deleted


async def test_an_order_is_new_to_the_trainer_though_the_registrys_clock_was_set_back(
    channel: grpc.aio.Channel, stub: "RegistryAsyncStub"
) -> None:
    await salt_of(channel, "pod-0")
    await publish(stub, draft(1))
    first = (await forget(stub, hash=ACME)).tenant
    done = pb.Learning(forgotten_unix_ms=first.forgotten_unix_ms + 3_600_000)
    report = pb.ReportTrainingRequest(speculator="default", message="trains", learning=done)
    await stub.ReportTraining(report, timeout=CALL_S)

    later = (await forget(stub, hash=RIVAL)).tenant

    assert later.forgotten_unix_ms == done.forgotten_unix_ms + 1
    assert not later.is_deleted


async def test_more_tenants_than_fit_into_a_message_come_in_pages(
    stub: "RegistryAsyncStub", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "_PAGE_BYTES", 64)
    hashes_ = list(range(1, 12))
    await publish(stub, draft(1), provenance=pb.Provenance(tenants=hashes_))
    found, after = list[int](), 0
    while True:
        page = await stub.ListTenants(pb.ListTenantsRequest(speculator="default", after=after), timeout=CALL_S)
        assert page.ByteSize() < 100
        found += [one.hash for one in page.tenants]
        after = page.next_after
        if not after:
            break
    assert found == hashes_


async def test_a_tenant_that_cannot_be_meant_is_refused(channel: grpc.aio.Channel, stub: "RegistryAsyncStub") -> None:
    with pytest.raises(NotFound, match="there is no speculator 'default'"), rpc.errors():
        await forget(stub, hash=ACME)
    with pytest.raises(NotFound, match="there is no speculator 'default'"), rpc.errors():
        await forget(stub, name="acme")
    await salt_of(channel, "pod-0")
    with pytest.raises(InvalidInput, match="must name one"), rpc.errors():
        await forget(stub)
    for name in (" ", "a\nb", "x" * 257):
        with pytest.raises(InvalidInput, match="1 to 256 printable"), rpc.errors():
            await forget(stub, name=name)

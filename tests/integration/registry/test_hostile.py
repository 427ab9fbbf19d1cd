"""Wrong, huge and hostile calls: each is refused in a sentence, and nothing of it stays."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio
import pytest
from tests.support.checkpoints import draft
from tests.support.registry import CALL_S, Registry, fetch, publish, registry_stub, state

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.errors import Exhausted, InvalidInput, NotFound

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

Call: TypeAlias = Callable[["RegistryAsyncStub", dict[str, Any]], Awaitable[Any]]

LARGEST = 2**32 - 1

WITH_REASON: dict[str, Call] = {
    "Pin": lambda stub, fields: stub.Pin(pb.PinRequest(**fields), timeout=CALL_S),
    "Unpin": lambda stub, fields: stub.Unpin(pb.UnpinRequest(**without_version(fields)), timeout=CALL_S),
    "Pause": lambda stub, fields: stub.Pause(pb.PauseRequest(**without_version(fields)), timeout=CALL_S),
    "Resume": lambda stub, fields: stub.Resume(pb.ResumeRequest(**without_version(fields)), timeout=CALL_S),
    "Promote": lambda stub, fields: stub.Promote(pb.PromoteRequest(**fields), timeout=CALL_S),
    "Reject": lambda stub, fields: stub.Reject(pb.RejectRequest(**fields), timeout=CALL_S),
}
ON_VERSION: dict[str, Call] = {
    "Promote": WITH_REASON["Promote"],
    "Reject": WITH_REASON["Reject"],
    "Retain": lambda stub, fields: stub.Retain(pb.RetainRequest(retain=True, **fields), timeout=CALL_S),
    "Get": lambda stub, fields: stub.Get(pb.GetRequest(**fields), timeout=CALL_S),
    "Fetch": lambda stub, fields: exhaust(stub.Fetch(pb.FetchRequest(**fields), timeout=CALL_S)),
}
ON_NAME: dict[str, Call] = {
    **WITH_REASON,
    **ON_VERSION,
    "List": lambda stub, fields: stub.List(pb.ListRequest(**without_version(fields)), timeout=CALL_S),
    "Watch": lambda stub, fields: exhaust(stub.Watch(pb.WatchRequest(**without_version(fields)), timeout=CALL_S)),
    "SetPolicy": lambda stub, fields: stub.SetPolicy(pb.SetPolicyRequest(**without_version(fields)), timeout=CALL_S),
    "ListPods": lambda stub, fields: stub.ListPods(pb.ListPodsRequest(**without_version(fields)), timeout=CALL_S),
    "History": lambda stub, fields: stub.History(pb.HistoryRequest(**fields), timeout=CALL_S),
}


def without_version(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "version"}


async def exhaust(responses: Any) -> None:
    async for _ in responses:
        pass


async def told(stub: "RegistryAsyncStub") -> tuple[pb.SpeculatorState, pb.HistoryResponse]:
    """All that a call could have changed."""
    return await state(stub), await stub.History(pb.HistoryRequest(speculator="default"), timeout=CALL_S)


@pytest.mark.attack(
    boundary="registry",
    attack="paths, control characters and other non-names as a speculator",
    outcome="refused by each method",
)
@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A", "a" * 64, "a\x00b", "default\n", "✓"])
async def test_a_name_that_is_none_is_refused_everywhere(stub: "RegistryAsyncStub", name: str) -> None:
    for method, call in ON_NAME.items():
        if name or method != "List":  # without a name it lists all
            with pytest.raises(InvalidInput, match="is not a valid speculator name"), rpc.errors():
                await call(stub, {"speculator": name, "version": 1})


@pytest.mark.attack(
    boundary="text",
    attack="reasons with control characters, line breaks or of great length",
    outcome="refused",
)
@pytest.mark.parametrize("reason", ["x" * 501, "two\nlines", "\x1b[2J", "\u202eright to left"])
async def test_a_reason_that_is_no_line_of_text_is_refused_everywhere(stub: "RegistryAsyncStub", reason: str) -> None:
    await publish(stub, draft(1))
    before = await told(stub)
    for call in WITH_REASON.values():
        with pytest.raises(InvalidInput, match="a reason"), rpc.errors():
            await call(stub, {"speculator": "default", "version": 1, "reason": reason})
    assert await told(stub) == before


async def test_a_speculator_that_nobody_knows_stays_unknown(stub: "RegistryAsyncStub") -> None:
    for call in {**WITH_REASON, **ON_VERSION}.values():
        with pytest.raises(NotFound), rpc.errors():
            await call(stub, {"speculator": "nobody", "version": 1})
    listed = await stub.List(pb.ListRequest(), timeout=CALL_S)
    assert not listed.speculators


@pytest.mark.parametrize("version", [0, 2, LARGEST])
async def test_a_version_that_was_never_published_is_told_so(stub: "RegistryAsyncStub", version: int) -> None:
    await publish(stub, draft(1))
    before = await told(stub)
    for call in ON_VERSION.values():
        with pytest.raises(NotFound, match=f"default has no version {version}; its newest is 1"), rpc.errors():
            await call(stub, {"speculator": "default", "version": version})
    assert await told(stub) == before


@pytest.mark.attack(boundary="registry", attack="a message above 4 MiB", outcome="refused before it is read")
async def test_what_is_larger_than_a_message_may_be_is_refused_before_it_is_read(
    registry: Registry, stub: "RegistryAsyncStub"
) -> None:
    await publish(stub, draft(1))
    before = await told(stub)
    async with grpc.aio.insecure_channel(registry.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        huge = {"speculator": "default", "version": 1, "reason": "x" * (rpc.MAX_MESSAGE_BYTES + 1)}
        for call in WITH_REASON.values():
            with pytest.raises(Exhausted), rpc.errors():
                await call(registry_stub(channel), huge)
    assert await told(stub) == before


@pytest.mark.attack(boundary="registry", attack="invented page tokens", outcome="refused")
@pytest.mark.parametrize("token", ["x", "/", "default/", "default/-1", "default/" + "9" * 40, "\x00/x"])
async def test_a_page_token_of_another_kind_is_refused(stub: "RegistryAsyncStub", token: str) -> None:
    with pytest.raises(InvalidInput, match="is not a page token of this registry"), rpc.errors():
        await stub.List(pb.ListRequest(page_token=token), timeout=CALL_S)


@pytest.mark.attack(
    boundary="registry",
    attack="limits of 2^32 in lists and histories",
    outcome="the registry's own limits hold",
)
async def test_limits_without_bounds_are_bounded(stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1))
    behind = pb.ListRequest(page_size=LARGEST, page_token="zzz/9999999999")  # noqa: S106 - no secret
    listed = await stub.List(behind, timeout=CALL_S)
    assert not listed.versions
    request = pb.HistoryRequest(speculator="default", limit=LARGEST, version=LARGEST)
    assert not (await stub.History(request, timeout=CALL_S)).transitions


@pytest.mark.parametrize("offset", [2**63 - 1, 2**64 - 1])
async def test_an_offset_behind_the_end_is_refused(stub: "RegistryAsyncStub", offset: int) -> None:
    await publish(stub, draft(1))
    with pytest.raises(InvalidInput, match="is beyond the end"):
        await fetch(stub, 1, offset=offset)


async def test_the_history_of_one_version_is_its_own(stub: "RegistryAsyncStub") -> None:
    for seed in (1, 2):
        await publish(stub, draft(seed))
    await stub.Pause(pb.PauseRequest(speculator="default", reason="lunch"), timeout=CALL_S)
    request = pb.HistoryRequest(speculator="default", version=2)
    history = await stub.History(request, timeout=CALL_S)
    assert {event.version for event in history.transitions} == {2}
    whole = await stub.History(pb.HistoryRequest(speculator="default"), timeout=CALL_S)
    assert next(event.version for event in whole.transitions) == 0


async def test_what_is_retained_is_told_and_remembered(stub: "RegistryAsyncStub") -> None:
    await publish(stub, draft(1))
    for retain in (True, True, False):
        request = pb.RetainRequest(speculator="default", version=1, retain=retain)
        assert (await stub.Retain(request, timeout=CALL_S)).version.retain == retain
    history = await stub.History(pb.HistoryRequest(speculator="default", version=1), timeout=CALL_S)
    assert [event.reason for event in history.transitions][:2] == [
        "no longer retained",
        "retained: its weights are kept",
    ]

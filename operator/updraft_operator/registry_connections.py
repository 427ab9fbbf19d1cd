"""Registries: one stream of states each, kept while the registry's pod is ready, and short calls beside it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis import rpc
from updraft_chassis.clock import Clock
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Forbidden, Unauthenticated, Unavailable, UpdraftError
from updraft_chassis.retry import Backoff
from updraft_operator.planning.conditions import ASKS_A_PERSON
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import Link, RegistryView
from updraft_operator.planning.plan import Call, Verb

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
_LIST_S = 30.0
"""So often the versions are listed, whatever the states say."""

_TELL_S = 5.0
"""At most so often a state is told in which only traffic moved."""

_PAGE = 200
_HISTORY = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a registry is, and what is shown at its door."""

    address: str
    token: str


@dataclass(slots=True)
class _Link:
    address: Address
    task: asyncio.Task[None]
    view: RegistryView
    lists: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while versions are listed, so that no older listing comes last."""


class Links:
    """The registries that are listened to; `close` ends it."""

    def __init__(self, tasks: asyncio.TaskGroup, clock: Clock, on_change: Callable[[Key], None], folder: Path) -> None:
        self._tasks = tasks
        self._clock = clock
        self._on_change = on_change
        self._folder = folder
        self._links: dict[Key, _Link] = {}

    def __len__(self) -> int:
        return len(self._links)

    def want(self, key: Key, address: Address | None) -> None:
        """Listen to a registry, or (None) no longer."""
        link = self._links.get(key)
        if link is not None and link.address == address:
            return
        if link is not None:
            link.task.cancel()
            del self._links[key]
        if address is not None:
            task = self._tasks.create_task(self._follow(key, address), name=f"registry of {key}")
            self._links[key] = _Link(address=address, task=task, view=RegistryView(link=Link.CONNECTING))

    def view(self, key: Key) -> RegistryView:
        """What it said last."""
        link = self._links.get(key)
        return RegistryView() if link is None else link.view

    async def call(self, key: Key, call: Call, policy: pb.RolloutPolicy) -> None:
        """Tell it something, and see what became of the versions: not every change is a new state.

        Raises its UpdraftErrors; Unavailable where nobody listens to it any more.
        """
        link = self._links.get(key)
        if link is None:
            raise Unavailable("the registry is not listened to")
        with rpc.errors():
            async with self._channel(key, link.address) as channel:
                stub = RegistryStub(channel)
                await _request(stub, key.name, call, policy)
                async with link.lists:
                    versions, transitions = await _listing(stub, key.name)
                    link.view = replace(link.view, versions=versions, transitions=transitions)

    def close(self) -> None:
        """Listen to nobody."""
        for link in self._links.values():
            link.task.cancel()
        self._links.clear()

    def _channel(self, key: Key, address: Address) -> Any:
        """A channel; its token is in a file of its own for as long as the process lives, for it is read again."""
        if not address.token:
            return rpc.channel(address.address, Credentials())
        token = self._folder / f"{key.namespace}.{key.name}"
        if not token.exists() or token.read_text() != address.token:
            token.touch(mode=0o600)
            token.write_text(address.token)
        return rpc.channel(address.address, Credentials(token_file=token))

    async def _follow(self, key: Key, address: Address) -> None:
        backoff = Backoff(initial_s=0.5, cap_s=15.0)
        while True:
            try:
                with rpc.errors():
                    async with self._channel(key, address) as channel:
                        stub = RegistryStub(channel)
                        listing = self._tasks.create_task(self._list(key, stub), name=f"versions of {key}")
                        try:
                            await self._listen(key, stub, backoff)
                        finally:
                            listing.cancel()
                raise Unavailable("the registry ended the stream")
            except UpdraftError as error:
                is_denied = isinstance(error, Unauthenticated | Forbidden)
                said = Link.DENIED if is_denied else Link.UNREACHABLE
                self._set(key, replace(self.view(key), link=said, trouble=f"{address.address}: {error}"), is_news=True)
            await asyncio.sleep(next(backoff))

    async def _list(self, key: Key, stub: "RegistryAsyncStub") -> None:
        """Now and then: that a version is kept no longer changes no state, and the same state is not said again."""
        while True:
            await asyncio.sleep(_LIST_S)
            link = self._links.get(key)
            if link is None:
                return
            try:
                async with link.lists:
                    with rpc.errors():
                        versions, transitions = await _listing(stub, key.name)
                    is_news = versions != link.view.versions
                    self._set(key, replace(link.view, versions=versions, transitions=transitions), is_news=is_news)
            except UpdraftError as error:  # the stream says it too if it lasts
                logger.info("Versions not listed", extra={"speculator": str(key), "error": str(error)})

    async def _listen(self, key: Key, stub: "RegistryAsyncStub", backoff: Backoff) -> None:
        before, told_s, link = b"", float("-inf"), self._links[key]
        async for answer in stub.Watch(pb.WatchRequest(speculator=key.name)):
            backoff.reset()
            now_s = self._clock.monotonic()
            quiet = _quiet(answer.state)
            is_news = quiet != before
            said: dict[str, Any] = {"link": Link.CONNECTED, "trouble": "", "state": answer.state}
            async with link.lists:
                if is_news:
                    versions, transitions = await _listing(stub, key.name)
                    said |= {"versions": versions, "transitions": transitions}
                    before = quiet
                is_due = is_news or now_s - told_s >= _TELL_S
                told_s = now_s if is_due else told_s
                self._set(key, replace(link.view, **said), is_news=is_due)

    def _set(self, key: Key, view: RegistryView, *, is_news: bool) -> None:
        link = self._links.get(key)
        if link is None:
            return
        link.view = view
        if is_news:
            self._on_change(key)


def _quiet(state: pb.SpeculatorState) -> bytes:
    """What of a state is no measurement."""
    still = pb.SpeculatorState()
    still.CopyFrom(state)
    still.ClearField("traffic")
    still.message = ASKS_A_PERSON if ASKS_A_PERSON in state.message else ""
    if still.HasField("rollout"):
        for name in (
            "acceptance_length",
            "inter_token_latency",
            "candidate_requests",
            "slices",
            "evidence",
            "paused_ms",
        ):
            still.rollout.ClearField(name)
    return still.SerializeToString(deterministic=True)


async def _listing(stub: "RegistryAsyncStub", name: str) -> tuple[tuple[pb.Version, ...], tuple[pb.Transition, ...]]:
    request = pb.ListRequest(speculator=name, page_size=_PAGE)
    versions: list[pb.Version] = []
    while True:
        page = await stub.List(request, timeout=TIMEOUT_S)
        versions += (each for each in page.versions if not each.pruned)
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    history = await stub.History(pb.HistoryRequest(speculator=name, limit=_HISTORY), timeout=TIMEOUT_S)
    return tuple(versions), tuple(reversed(history.transitions))


async def _request(stub: "RegistryAsyncStub", name: str, call: Call, policy: pb.RolloutPolicy) -> None:
    number = call.version
    why = "spec.rollout of the AdaptiveSpeculator"
    calls: dict[Verb, Callable[[], Awaitable[Any]]] = {
        Verb.SET_POLICY: lambda: stub.SetPolicy(pb.SetPolicyRequest(speculator=name, policy=policy), timeout=TIMEOUT_S),
        Verb.PIN: lambda: stub.Pin(pb.PinRequest(speculator=name, version=number, reason=why), timeout=TIMEOUT_S),
        Verb.UNPIN: lambda: stub.Unpin(pb.UnpinRequest(speculator=name, reason=why), timeout=TIMEOUT_S),
        Verb.PAUSE: lambda: stub.Pause(pb.PauseRequest(speculator=name, reason=why), timeout=TIMEOUT_S),
        Verb.RESUME: lambda: stub.Resume(pb.ResumeRequest(speculator=name, reason=why), timeout=TIMEOUT_S),
        Verb.PROMOTE: lambda: stub.Promote(
            pb.PromoteRequest(speculator=name, version=number, reason=why), timeout=TIMEOUT_S
        ),
        Verb.RETAIN: lambda: stub.Retain(
            pb.RetainRequest(speculator=name, version=number, retain=True), timeout=TIMEOUT_S
        ),
        Verb.RELEASE: lambda: stub.Retain(
            pb.RetainRequest(speculator=name, version=number, retain=False), timeout=TIMEOUT_S
        ),
    }
    await calls[call.verb]()

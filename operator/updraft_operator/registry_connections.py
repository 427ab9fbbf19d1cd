"""Connections to registries: one stream of states per registry while its pod is ready, and short calls."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeGuard

from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_chassis import rpc
from updraft_chassis.clock import Clock
from updraft_chassis.credentials import Credentials, TokenChannel
from updraft_chassis.errors import Forbidden, Unauthenticated, Unavailable, UpdraftError
from updraft_chassis.retry import Backoff
from updraft_operator.planning.conditions import ASKS_A_PERSON
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import ConnectionState, RegistryView
from updraft_operator.planning.registry_calls import RegistryCall, RegistryVerb
from updraft_operator.planning.serving.attached import REPORTED_S
from updraft_operator.registry_tokens import FewRequests, RegistryToken, Token, TokenRequest

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
_LIST_S = 30.0
"""Period of listing the versions, whatever the stream sends."""

_RETRY_S = 30.0
"""How long a stream uses an older token while the API server returns no new one."""

_LEAN = (("grpc.enable_retries", 0), ("grpc.enable_channelz", 0), ("grpc.tsi.max_frame_size", 4096))
"""These save 11 kB of a connection's 87 kB, and 24 kB of 175 kB with TLS. Nobody asks for channelz, and the operator's requests
are small. Without gRPC's retries, a call that meets a restart fails, and is made again half a second later."""

_PAGE = 200
_HISTORY = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryAddress:
    address: str
    audience: str
    """Audience of tokens for this registry."""
    host: str = ""
    """The name in its certificate."""
    authorities: str = ""
    """The CAs of its certificate, in PEM format; empty: it speaks no TLS."""
    lists_pods: bool = False
    """Whether the reports of its pods are read, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """Answers that the stream of states does not have."""

    versions: tuple[pb.Version, ...]
    transitions: tuple[pb.Transition, ...]
    pods: tuple[pb.PodState, ...]

    def shown_in(self, view: RegistryView) -> RegistryView:
        return replace(view, versions=self.versions, transitions=self.transitions, pods=self.pods)


@dataclass(slots=True)
class _Connection:
    address: RegistryAddress
    token: RegistryToken
    task: asyncio.Task[None]
    view: RegistryView
    connected_s: float = 0.0
    """When the stream began, if it is connected."""
    lists: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while versions are listed, so that an older listing never overwrites a newer one."""


class RegistryConnections:
    """One connection per speculator's registry, until `close`.

    `on_change` is told about news; `on_measurement`, at most every `measured_s`, about new measurements.
    """

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        request: TokenRequest,
        clock: Clock,
        on_change: Callable[[Key], None],
        *,
        on_measurement: Callable[[Key], None],
        measured_s: float,
    ) -> None:
        self._tasks = tasks
        self._request = FewRequests(request)
        self._clock = clock
        self._on_change = on_change
        self._on_measurement = on_measurement
        self._measured_s = measured_s
        self._connections: dict[Key, _Connection] = {}

    @property
    def num_connected(self) -> int:
        """Registries that have answered; any thread may ask."""
        return sum(connection.view.is_connected for connection in list(self._connections.values()))

    def set_address(self, key: Key, address: RegistryAddress | None) -> None:
        connection = self._connections.get(key)
        if connection is not None and _is_same(address, connection.address):
            connection.address = address  # with the CAs for the next channel: this one keeps its own
            return
        if connection is not None:
            connection.task.cancel()
            del self._connections[key]
        if address is not None:
            token = RegistryToken(self._request, address.audience, self._clock)
            task = self._tasks.create_task(self._follow(key, token), name=f"registry of {key}")
            view = RegistryView(connection=ConnectionState.CONNECTING)
            self._connections[key] = _Connection(address=address, token=token, task=task, view=view)

    def view(self, key: Key) -> RegistryView:
        connection = self._connections.get(key)
        if connection is None:
            return RegistryView()
        return replace(connection.view, has_all_pods=self._clock.monotonic() - connection.connected_s >= REPORTED_S)

    async def call(self, key: Key, call: RegistryCall, policy: pb.RolloutPolicy) -> None:
        """Call the registry, then list its versions, because not every change is sent as a new state.

        Raises the registry's UpdraftErrors; Unavailable if there is no connection.
        """
        connection = self._connections.get(key)
        if connection is None:
            raise Unavailable("there is no connection to the registry")
        with rpc.errors():
            async with _channel(connection.address, await connection.token.get()) as channel:
                await _request(RegistryStub(channel), key.name, call, policy)
                async with connection.lists:
                    listing = await _listing(channel, key.name, connection.address)
                    connection.view = listing.shown_in(connection.view)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.task.cancel()
        self._connections.clear()

    async def _follow(self, key: Key, token: RegistryToken) -> None:
        backoff = Backoff(initial_s=0.5, cap_s=15.0)
        while True:
            try:
                await self._follow_until_renewal(key, token, backoff)
                continue
            except UpdraftError as error:
                is_denied = isinstance(error, Unauthenticated | Forbidden)
                state = ConnectionState.DENIED if is_denied else ConnectionState.UNREACHABLE
                problem = f"{self._connections[key].address.address}: {error}"
                self._set(key, replace(self.view(key), connection=state, problem=problem), is_news=True)
            await asyncio.sleep(next(backoff))

    async def _follow_until_renewal(self, key: Key, token: RegistryToken, backoff: Backoff) -> None:
        """Follow until the token must be renewed: the registry ends streams with expired tokens. Raises UpdraftErrors."""
        current = await token.get()
        left_s = current.renewed_s - self._clock.monotonic()
        with rpc.errors():
            async with _channel(self._connections[key].address, current) as channel:
                listing = self._tasks.create_task(self._list(key, channel), name=f"versions of {key}")
                try:
                    async with asyncio.timeout(left_s if left_s > 0 else _RETRY_S) as renewal:
                        await self._listen(key, channel, backoff)
                except TimeoutError:
                    if renewal.expired():
                        return
                    raise
                finally:
                    listing.cancel()
        raise Unavailable("the registry closed the stream")

    async def _list(self, key: Key, channel: TokenChannel) -> None:
        """List periodically: pruning a version changes no state, so the stream does not report it."""
        while True:
            await asyncio.sleep(_LIST_S)
            connection = self._connections.get(key)
            if connection is None:
                return
            try:
                async with connection.lists:
                    with rpc.errors():
                        listing = await _listing(channel, key.name, connection.address)
                    is_news = listing.versions != connection.view.versions or listing.pods != connection.view.pods
                    self._set(key, listing.shown_in(connection.view), is_news=is_news)
            except UpdraftError as error:  # if it lasts, the stream reports it too
                logger.info("Listing versions failed", extra={"speculator": str(key), "error": str(error)})

    async def _listen(self, key: Key, channel: TokenChannel, backoff: Backoff) -> None:
        notified_s, connection = float("-inf"), self._connections[key]
        known = connection.view.state if connection.view.is_connected else None  # a stream with an older token told it
        before = None if known is None else _without_measurements(known)
        async for answer in RegistryStub(channel).Watch(pb.WatchRequest(speculator=key.name)):
            backoff.reset()
            now_s = self._clock.monotonic()
            essentials = _without_measurements(answer.state)
            is_news = essentials != before
            async with connection.lists:
                if connection.view.connection is not ConnectionState.CONNECTED:
                    connection.connected_s = now_s
                view = replace(connection.view, connection=ConnectionState.CONNECTED, problem="", state=answer.state)
                if is_news:
                    view = (await _listing(channel, key.name, connection.address)).shown_in(view)
                    before = essentials
                self._set(key, view, is_news=is_news)
                if not is_news and now_s - notified_s >= self._measured_s:
                    notified_s = now_s
                    self._on_measurement(key)

    def _set(self, key: Key, view: RegistryView, *, is_news: bool) -> None:
        connection = self._connections.get(key)
        if connection is None:
            return
        connection.view = view
        if is_news:
            self._on_change(key)


def _is_same(new: RegistryAddress | None, former: RegistryAddress) -> TypeGuard[RegistryAddress]:
    """Whether they are of the same registry, whatever its CAs."""
    return new is not None and replace(new, authorities="") == replace(former, authorities="")


def _channel(address: RegistryAddress, token: Token) -> TokenChannel:
    tls = Credentials(authorities=address.authorities.encode(), server_name=address.host)
    return TokenChannel(rpc.channel(address.address, tls, _LEAN), lambda: token.value)


def _without_measurements(state: pb.SpeculatorState) -> pb.SpeculatorState:
    """The state without the fields that change with traffic."""
    still = pb.SpeculatorState()
    still.CopyFrom(state)
    still.ClearField("traffic")
    still.ClearField("trainer_message")
    still.ClearField("speedup")
    still.ClearField("demand_tokens_per_second")
    still.ClearField("granted_tokens_per_second")
    if state.HasField("learning"):
        still.learning.CopyFrom(_landmarks(state.learning))
    still.message = ASKS_A_PERSON if ASKS_A_PERSON in state.message else ""
    if not state.HasField("rollout"):
        return still
    for name in ("acceptance_length", "inter_token_latency", "candidate_requests", "slices", "evidence", "paused_ms"):
        still.rollout.ClearField(name)
    return still


def _landmarks(learning: pb.Learning) -> pb.Learning:
    """As much of what the trainer has done as decides on conditions."""
    is_short = learning.samples < learning.samples_to_start
    return pb.Learning(
        samples=min(1, learning.samples),
        steps=min(1, learning.steps + learning.estimates),
        samples_to_start=int(is_short),
        too_small="something" if learning.too_small else "",
        device=learning.device,
        world_size=learning.world_size,
    )


async def _listing(channel: TokenChannel, name: str, registry: RegistryAddress) -> _Listing:
    """With a stub that goes at once: its twenty methods take as much memory as half of what a connection takes else."""
    stub = RegistryStub(channel)
    request = pb.ListRequest(speculator=name, page_size=_PAGE)
    versions: list[pb.Version] = []
    while True:
        page = await stub.List(request, timeout=TIMEOUT_S)
        versions += (version for version in page.versions if not version.pruned)
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    history = await stub.History(pb.HistoryRequest(speculator=name, limit=_HISTORY), timeout=TIMEOUT_S)
    return _Listing(
        versions=tuple(versions),
        transitions=tuple(reversed(history.transitions)),
        pods=await _connected_pods(stub, name) if registry.lists_pods else (),
    )


async def _connected_pods(stub: "RegistryAsyncStub", name: str) -> tuple[pb.PodState, ...]:
    """The reports of pods with a stream, without numbers that change all the time."""
    request = pb.ListPodsRequest(speculator=name, page_size=_PAGE)
    pods: list[pb.PodState] = []
    while True:
        page = await stub.ListPods(request, timeout=TIMEOUT_S)
        pods += (_report(pod) for pod in page.pods if pod.connected)
        request.page_token = page.next_page_token
        if not request.page_token:
            return tuple(pods)


def _report(pod: pb.PodState) -> pb.PodState:
    return pb.PodState(
        pod=pod.pod,
        engine=pod.engine,
        device=pod.device,
        problem=pod.problem,
        capture_problem=pod.capture_problem,
        waits_for_restart=pod.waits_for_restart,
        refused=pod.refused,
    )


async def _request(stub: "RegistryAsyncStub", name: str, call: RegistryCall, policy: pb.RolloutPolicy) -> None:
    number, why = call.version, "spec.rollout of the AdaptiveSpeculator"
    match call.verb:
        case RegistryVerb.SET_POLICY:
            await stub.SetPolicy(pb.SetPolicyRequest(speculator=name, policy=policy), timeout=TIMEOUT_S)
        case RegistryVerb.PIN:
            await stub.Pin(pb.PinRequest(speculator=name, version=number, reason=why), timeout=TIMEOUT_S)
        case RegistryVerb.UNPIN:
            await stub.Unpin(pb.UnpinRequest(speculator=name, reason=why), timeout=TIMEOUT_S)
        case RegistryVerb.PAUSE:
            await stub.Pause(pb.PauseRequest(speculator=name, reason=why), timeout=TIMEOUT_S)
        case RegistryVerb.RESUME:
            await stub.Resume(pb.ResumeRequest(speculator=name, reason=why), timeout=TIMEOUT_S)
        case RegistryVerb.PROMOTE:
            await stub.Promote(pb.PromoteRequest(speculator=name, version=number, reason=why), timeout=TIMEOUT_S)
        case RegistryVerb.RETAIN | RegistryVerb.RELEASE:
            retain = call.verb is RegistryVerb.RETAIN
            await stub.Retain(pb.RetainRequest(speculator=name, version=number, retain=retain), timeout=TIMEOUT_S)

"""Pods without an engine, over real gRPC: what a registry sees of a thousand of them, from one process.

Each has a connection of its own, keeps its stream, reports whole states, and follows directives: it fetches (a delta if it
is offered one), verifies, serves, and says how it went. It survives whatever happens to the registry.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import grpc.aio
from tests.support.sim_library import Arrival, Library

from updraft.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from updraft.registry.v1 import registry_pb2 as pb
from updraft.registry.v1 import registry_pb2_grpc
from updraft_chassis import rpc
from updraft_chassis.errors import Corrupt, UpdraftError
from updraft_chassis.retry import Backoff

if TYPE_CHECKING:
    from updraft.fleet.v1.fleet_pb2_grpc import FleetAsyncStub
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

CALL_S = 60.0
FETCH_S = 600.0
"""A thousand readers queue for their turn."""

_OPTIONS = [
    # Channels of one process to one address share a connection otherwise.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]

_MAX_VERSIONS = 16

_Stream: TypeAlias = "grpc.aio.StreamStreamCall[fleet_pb2.ConnectRequest, fleet_pb2.ConnectResponse]"

_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
_TOKENS_PER_REQUEST = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How a version does: tokens a verify step, seconds between tokens, and the share of requests that fail."""

    acceptance_length: float = 2.0
    latency_s: float = 0.02
    errors: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What pods do besides following directives."""

    speculator: str = "default"
    target: str = ""
    report_s: float = 10.0
    swap_s: float = 0.001
    """The pause of a swap."""
    requests_per_s: float = 0.0
    """Of one pod, heavy-tailed in tokens; 0: no traffic."""
    quality: Callable[[int], Quality] = lambda _: Quality()
    """By version."""
    refuses: Callable[[str, int], str] = lambda _pod, _version: ""
    """Why a pod cannot load a version; empty: it can."""
    kills: Callable[[int], bool] = lambda _: False
    """Whether a version kills the process that loads it."""
    wants_deltas: bool = True
    seed: int = 0


@dataclass(slots=True)
class _Tally:
    """Counters of one version."""

    requests: int = 0
    steps: int = 0
    tokens: int = 0
    errors: int = 0
    latency_s: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BUCKETS) + 1))

    def add(self, quality: Quality, rng: random.Random) -> None:
        """One more request."""
        tokens = max(1, round(rng.lognormvariate(0.0, 1.0) * _TOKENS_PER_REQUEST))
        length = max(1.0, quality.acceptance_length * rng.lognormvariate(0.0, 0.1))
        self.requests += 1
        self.errors += rng.random() < quality.errors
        self.tokens += tokens
        self.steps += max(1, round(tokens / length))
        self.latency_s += tokens * quality.latency_s * rng.lognormvariate(0.0, 0.1)
        self.counts[sum(quality.latency_s > bound for bound in _BUCKETS)] += tokens

    def message(self, version: int) -> fleet_pb2.VersionCounters:
        accepted = max(0, self.tokens - self.steps)
        return fleet_pb2.VersionCounters(
            version=version,
            requests_served=self.requests,
            verify_steps=self.steps,
            tokens=self.tokens,
            proposed=3 * self.steps,
            proposed_by_position=[self.steps] * 3,
            accepted_by_position=[accepted // 2, accepted // 3, accepted // 6],
            errors=self.errors,
            inter_token_latency=fleet_pb2.Histogram(bounds=_BUCKETS, counts=self.counts, sum=self.latency_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A version that a pod holds."""

    version: int
    digest: str
    tensors_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A version that a pod was told to serve."""

    version: int
    digest: str
    at_ms: int


NONE = Draft(version=0, digest="", tensors_digest="")


class SimPod:
    """One pod; `run` it in a task. It survives whatever happens to the registry."""

    def __init__(
        self,
        address: str,
        name: str,
        behaviour: Behaviour,
        library: Library,
        tls: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.name = name
        self._tls = tls
        self.loaded = NONE
        self.held: dict[int, Draft] = {}
        self.directive = fleet_pb2.Directive()
        self.directives: list[Order] = []
        """All that it was ordered to serve, by turns too."""
        self.served: list[tuple[int, str]] = []
        """Version and digest of all that it served."""
        self.status = fleet_pb2.DirectiveStatus()
        self.is_connected = False
        self.is_draining = False
        self.num_connects = 0
        self.num_crashes = 0
        self._address = address
        self._behaviour = behaviour
        self._library = library
        self._rng = random.Random(f"{behaviour.seed}/{name}")
        self._tallies: dict[int, _Tally] = {}
        self._num_lost = 0
        self._swaps = fleet_pb2.SwapCounters()
        self._boot = self._new_boot()
        self._served_until_s = time.monotonic()
        self._hung_up = asyncio.Event()
        self._changed = asyncio.Event()
        self._arrived = asyncio.Event()

    async def run(self) -> None:
        """Stay connected and follow directives, until cancelled."""
        opened = (
            grpc.aio.insecure_channel(self._address, options=_OPTIONS)
            if self._tls is None
            else grpc.aio.secure_channel(self._address, self._tls, options=_OPTIONS)
        )
        async with opened as channel, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_all(registry_pb2_grpc.RegistryStub(channel)))
            tasks.create_task(self._stay_connected(fleet_pb2_grpc.FleetStub(channel)))

    @property
    def num_failed(self) -> int:
        """Requests that failed, over all its lives."""
        return self._num_lost + sum(tally.errors for tally in self._tallies.values())

    def crash(self) -> None:
        """Lose the stream, all counters and the requests that run, and serve again what is on the disk."""
        self.num_crashes += 1
        running = (time.monotonic() - self._served_until_s) * self._behaviour.requests_per_s
        self._num_lost = self.num_failed + max(1, round(running))
        self.directive = fleet_pb2.Directive()
        self._tallies, self._swaps, self._boot = {}, fleet_pb2.SwapCounters(), self._new_boot()
        self._served_until_s = time.monotonic()
        self._hung_up.set()

    def drain(self) -> None:
        """Say that it will go away."""
        self.is_draining = True
        self._changed.set()

    def report(self) -> fleet_pb2.PodReport:
        """Its state now."""
        self._serve()
        return fleet_pb2.PodReport(
            identity=fleet_pb2.PodIdentity(
                speculator=self._behaviour.speculator,
                pod=self.name,
                engine="sim/1",
                target_fingerprint=self._behaviour.target,
                boot_id=self._boot,
            ),
            loaded=fleet_pb2.Loaded(version=self.loaded.version, tensors_digest=self.loaded.tensors_digest),
            prefetched_versions=sorted(self.held),
            versions=[tally.message(version) for version, tally in self._tallies.items()],
            swaps=self._swaps,
            status=self.status,
            draining=self.is_draining,
            sent_unix_ms=int(time.time() * 1000),
        )

    async def _stay_connected(self, stub: "FleetAsyncStub") -> None:
        backoff = Backoff(cap_s=5.0, rng=self._rng)
        while True:
            self._hung_up.clear()
            call = stub.Connect()
            self.num_connects += 1
            try:
                async with asyncio.TaskGroup() as tasks:
                    others = [tasks.create_task(self._send(call)), tasks.create_task(self._hang_up())]
                    while isinstance(response := await call.read(), fleet_pb2.ConnectResponse):
                        self.is_connected = True
                        backoff.reset()
                        self._accept(response.directive)
                    for task in others:
                        task.cancel()
            except* (_HungUpError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            finally:
                self.is_connected = False
                call.cancel()
            await asyncio.sleep(next(backoff))

    async def _hang_up(self) -> None:
        await self._hung_up.wait()
        raise _HungUpError

    async def _send(self, call: _Stream) -> None:
        wait_s = self._rng.uniform(0.0, self._behaviour.report_s)  # who connected at once reports evenly from here on
        while True:
            self._changed.clear()
            await call.write(fleet_pb2.ConnectRequest(report=self.report()))
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            wait_s = self._behaviour.report_s

    def _accept(self, directive: fleet_pb2.Directive) -> None:
        if self._hung_up.is_set():  # said to a life that has ended
            return
        plan = directive.switchback
        ordered = [(directive.serve_version, directive.serve_digest)]
        if directive.HasField("switchback"):
            ordered = [(plan.version_a, plan.digest_a), (plan.version_b, plan.digest_b)]
        at_ms = int(time.time() * 1000)
        self.directives += [Order(version=version, digest=digest, at_ms=at_ms) for version, digest in ordered]
        if directive.nonce != self.directive.nonce:
            self.directive = directive
            self._arrived.set()

    async def _follow_all(self, stub: "RegistryAsyncStub") -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(self._follow(stub, self.directive))
                newer = tasks.create_task(self._arrived.wait())
                await asyncio.wait({following, newer}, return_when=asyncio.FIRST_COMPLETED)
                following.cancel()
                newer.cancel()

    async def _follow(self, stub: "RegistryAsyncStub", directive: fleet_pb2.Directive) -> None:
        """Do what it says, however long the registry is away."""
        self._tell(directive, fleet_pb2.OUTCOME_PENDING)
        await asyncio.sleep(self._rng.uniform(0.0, directive.prefetch_spread_ms / 1000))
        for delay_s in Backoff(rng=self._rng):
            with suppress(UpdraftError), rpc.errors():
                await self._obey(stub, directive)
                return
            await asyncio.sleep(delay_s)

    async def _obey(self, stub: "RegistryAsyncStub", directive: fleet_pb2.Directive) -> None:
        plan, number = directive.switchback, directive.serve_version
        why = self._behaviour.refuses(self.name, number)
        if why:
            self._tell(directive, fleet_pb2.OUTCOME_NACK, why)
            return
        if directive.HasField("switchback"):
            drafts = [
                await self._hold(stub, n, d)
                for n, d in ((plan.version_a, plan.digest_a), (plan.version_b, plan.digest_b))
            ]
        else:
            drafts = [await self._hold(stub, number, directive.serve_digest)]
            await self._load(drafts[0])
        for version in directive.prefetch_versions:
            await self._hold(stub, version, "")
        wanted = {number, *directive.prefetch_versions}
        self.held = {version: draft for version, draft in self.held.items() if version in wanted}
        self._tell(directive, fleet_pb2.OUTCOME_ACK)
        while directive.HasField("switchback"):
            index, past_s = divmod(time.time() - plan.start_unix_ms / 1000, plan.slice_seconds)
            await self._load(drafts[int(index) % 2])
            await asyncio.sleep(plan.slice_seconds - past_s)

    async def _load(self, draft: Draft) -> None:
        if draft == self.loaded:
            return
        await asyncio.sleep(self._behaviour.swap_s)
        if self._behaviour.kills(draft.version):
            self.crash()
            await asyncio.Event().wait()  # until the next life, which begins with what the registry says then
        self._serve()
        self.loaded = draft
        self.served.append((draft.version, draft.digest))
        self._swaps.swaps += 1
        self._swaps.pause_us_sum += int(1e6 * self._behaviour.swap_s)
        self._changed.set()

    async def _hold(self, stub: "RegistryAsyncStub", version: int, digest: str) -> Draft:
        """Have a version; an empty digest is any."""
        known = self.held.get(version, NONE)
        if version == 0 or (known is not NONE and digest in ("", known.digest)):
            return known
        request = pb.GetRequest(speculator=self._behaviour.speculator, version=version)
        manifest = (await stub.Get(request, timeout=CALL_S)).version.manifest
        if digest not in ("", manifest.digest):
            raise Corrupt(f"version {version} is {manifest.digest}, ordered was {digest}")
        await self._fetch(stub, version, manifest.digest)
        self.held[version] = Draft(version=version, digest=manifest.digest, tensors_digest=manifest.tensors_digest)
        self._changed.set()
        return self.held[version]

    async def _fetch(self, stub: "RegistryAsyncStub", version: int, digest: str) -> None:
        """Receive a version and verify it."""
        request = pb.FetchRequest(speculator=self._behaviour.speculator, version=version)
        if self._behaviour.wants_deltas and self.loaded.digest in self._library.weights:
            request.delta_base_version, request.delta_base_digest = self.loaded.version, self.loaded.digest
        arrival = Arrival(self._library, base=self.loaded.digest, digest=digest)
        async for response in stub.Fetch(request, timeout=FETCH_S):
            arrival.take(response)
        await asyncio.sleep(arrival.end())

    def _tell(self, directive: fleet_pb2.Directive, outcome: "fleet_pb2.Outcome.ValueType", reason: str = "") -> None:
        self.status = fleet_pb2.DirectiveStatus(
            nonce=directive.nonce, outcome=outcome, version=directive.serve_version, reason=reason
        )
        self._changed.set()

    def _serve(self) -> None:
        """Account for the requests since the last time, under the version that served them."""
        now_s, version = time.monotonic(), self.loaded.version
        expected = (now_s - self._served_until_s) * self._behaviour.requests_per_s
        count = int(expected + self._rng.random())
        self._served_until_s = now_s
        if count:
            tally, quality = self._tallies.setdefault(version, _Tally()), self._behaviour.quality(version)
            for _ in range(count):
                tally.add(quality, self._rng)
            self._tallies = dict(list(self._tallies.items())[-_MAX_VERSIONS:])

    def _new_boot(self) -> str:
        return f"{self._rng.getrandbits(64):x}"


class _HungUpError(Exception):
    """The pod's process is gone."""


@asynccontextmanager
async def pods(
    address: str,
    num_pods: int,
    behaviour: Behaviour | None = None,
    *,
    library: Library | None = None,
    tls: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[list[SimPod]]:
    """So many pods that run until the block ends; with `tls`, they believe these CAs."""
    behaviour, library = behaviour or Behaviour(), library or Library()
    made = [SimPod(address, f"pod-{i:04}", behaviour, library, tls) for i in range(num_pods)]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(pod.run()) for pod in made]
        try:
            yield made
        finally:
            for task in running:
                task.cancel()

"""A registry as a backend: short calls over gRPC."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_chassis.errors import Unavailable, UpdraftError
from updraft_cli.backends import registry_client as client
from updraft_cli.backends import wire
from updraft_cli.backends.drafts import DraftDetails, DraftList, History
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.policy import Policy
from updraft_cli.backends.protocol import Decision, PolicyChange, Verb, Version, decided, with_outages
from updraft_cli.backends.registry_client import TIMEOUT_S
from updraft_cli.backends.snapshot import PodDetails, Snapshot, SpeculatorSnapshot
from updraft_cli.backends.speculators import RolloutStatus, Speculator, has_served

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

_COMPLETION_S = 0.7
"""Somebody has pressed a key and waits: late suggestions are worse than none."""

_HISTORY_LIMIT = 50
"""Default number of changes in a history."""

_CONSOLE_HISTORY = 200
"""Changes that a console shows."""

_RELIST_S = 20.0
"""A console lists all versions this often, and whenever one has changed."""

_REFRESH_S = 2.0
"""Between two looks at everything that runs."""

Answer = TypeVar("Answer")


class Run(Protocol):
    """Runs a coroutine to its end."""

    def __call__(self, coroutine: Coroutine[Any, Any, Answer], /) -> Answer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryBackend:
    """The registry at `address`, and one speculator in it."""

    address: str
    speculator: str = "default"
    is_one: bool = False
    """The NAME argument names `speculator`: `status` shows no others."""
    credentials: Credentials
    within_s: float | None = None
    """How long an answer may take in all; None: each call has its deadline."""
    reason: str = ""
    """Reason that the history shows for decisions made here."""
    local: Callable[[], Installation]
    """Look at the processes on this machine."""
    run: Run = asyncio.run
    """Runs each call; several threads of one process need a loop that they share."""

    def call(self, ask: "Callable[[RegistryAsyncStub], Awaitable[Answer]]") -> Answer:
        """Return what `ask` returns for a connected registry."""

        async def connected() -> Answer:
            async with client.connected(self.address, self.credentials) as stub:
                if self.within_s is None:
                    return await ask(stub)
                async with rpc.unavailable_after(self.within_s, f"it does not answer within {self.within_s:g} s"):
                    return await ask(stub)

        return self.run(connected())

    def installation(self) -> Installation:
        installation = replace(self.local(), speculators=self._speculators())
        if not installation.processes and installation.speculators is None and installation.serving is None:
            raise Unavailable(
                f"nothing runs: no registry at {self.address}, no inference, and no `updraft up`;"
                " start everything with `updraft up`, or name a registry with --registry"
            )
        return installation

    def watch_installation(self) -> Generator[Installation | Unavailable]:
        def states() -> Generator[Installation]:
            while True:
                yield self.installation()
                time.sleep(_REFRESH_S)

        return with_outages(states)

    @property
    def place(self) -> str:
        return f"the registry at {self.address}"

    @property
    def has_reasons(self) -> bool:
        return True

    def about(self, speculator: str, reason: str = "") -> Self:
        return replace(self, speculator=speculator, is_one=True, reason=reason)

    def refusal(self) -> str:
        return ""  # a registry tells nobody which role a token has, so the attempt tells

    def snapshots(self) -> Generator[Snapshot]:
        known: dict[str, _Known] = {}
        while True:
            yield self._snapshot(known)

    def pod(self, name: str) -> PodDetails:
        async def ask(stub: "RegistryAsyncStub") -> pb.ListPodsResponse:
            request = pb.ListPodsRequest(speculator=self.speculator, pod=name)
            return await stub.ListPods(request, timeout=TIMEOUT_S)

        return wire.pod_details(self.call(ask).pods[0])

    def drafts(self) -> DraftList:
        return wire.draft_list(self.speculator, self.call(lambda stub: client.listing(stub, self.speculator)))

    def draft(self, version: Version) -> DraftDetails:
        async def ask(stub: "RegistryAsyncStub") -> DraftDetails:
            number = await client.resolve(stub, self.speculator, version)
            message = await client.version(stub, self.speculator, number)
            state, _ = await client.newest(stub, self.speculator)
            return wire.draft_details(message, state, await client.history(stub, self.speculator, number))

        return self.call(ask)

    def history(self, version: Version | None, *, limit: int | None, has_kubernetes_events: bool) -> History:
        async def ask(stub: "RegistryAsyncStub") -> list[pb.Transition]:
            number = 0 if version is None else await client.resolve(stub, self.speculator, version)
            if number:
                await client.version(stub, self.speculator, number)  # NotFound rather than an empty history
            return await client.history(stub, self.speculator, number, limit=limit or _HISTORY_LIMIT)

        return History(speculator=self.speculator, events=tuple(map(wire.history_entry, self.call(ask))))

    def rollout(self, version: Version | None) -> RolloutStatus:
        async def ask(stub: "RegistryAsyncStub") -> RolloutStatus:
            number = 0 if version is None else await client.resolve(stub, self.speculator, version)
            state, _ = await client.newest(stub, self.speculator)
            return await _status(stub, state, number or state.candidate or state.latest)

        return self.call(ask)

    def watch_rollout(
        self, version: Version | None, *, is_endless: bool, deadline_s: float | None
    ) -> Generator[RolloutStatus | Unavailable]:
        # The registry sends whole states, so nothing but the number has to be remembered over a lost connection.
        followed = 0
        if version is not None:
            followed = self.call(lambda stub: client.resolve(stub, self.speculator, version))
        has_begun = False
        away = Unavailable(f"the registry at {self.address} is away")

        async def watched() -> AsyncGenerator[RolloutStatus, None]:
            nonlocal followed, has_begun
            async with client.connected(self.address, self.credentials) as stub:
                call = stub.Watch(pb.WatchRequest(speculator=self.speculator))
                try:
                    async for response in call:
                        number = followed or response.state.candidate or response.state.latest
                        followed = followed if is_endless else number
                        status = await _status(stub, response.state, number)
                        has_begun = True
                        yield status
                finally:
                    call.cancel()
            raise away

        def states() -> Generator[RolloutStatus]:
            """Run an event loop for the length of one connection."""
            with asyncio.Runner() as runner:
                connection = watched()

                async def following() -> RolloutStatus:
                    async with asyncio.timeout_at(deadline_s):
                        return await anext(connection)

                try:
                    while True:
                        yield runner.run(following())
                except Unavailable as error:
                    raise (away if has_begun else error) from error
                finally:
                    runner.run(connection.aclose())

        return with_outages(states, deadline_s=deadline_s)

    def policy(self) -> Policy:
        return self.rollout(None).policy

    def set_policy(self, whole: Policy | None, changes: dict[str, Any]) -> PolicyChange:
        async def ask(stub: "RegistryAsyncStub") -> PolicyChange:
            state, _ = await client.newest(stub, self.speculator)
            before = Policy.from_proto(state.policy)
            policy = (whole or before).with_changes(changes).to_proto()
            request = pb.SetPolicyRequest(speculator=self.speculator, policy=policy)
            state = (await stub.SetPolicy(request, timeout=TIMEOUT_S)).state
            after = Policy.from_proto(state.policy)
            return PolicyChange(speculator=self.speculator, before=before, after=after, message=state.message)

        return self.call(ask)

    def decide(self, verb: Verb, version: Version | None) -> Decision:
        async def ask(stub: "RegistryAsyncStub") -> Decision:
            number = 0 if version is None else await client.resolve(stub, self.speculator, version)
            state = await self._decide(stub, verb, number)
            return Decision(
                name=self.speculator,
                verb=verb,
                version=None if version is None else number,
                changed=True,
                message=decided(verb, self.speculator, number, state.message),
            )

        return self.call(ask)

    def names(self) -> tuple[str, ...]:
        return tuple(state.speculator for state in self._completions("").speculators)

    def numbers(self) -> tuple[tuple[int, str], ...]:
        versions = self._completions(self.speculator).versions
        return tuple((version.version, f"{wire.phase(version.phase)}: {version.reason}") for version in versions)

    async def _decide(self, stub: "RegistryAsyncStub", verb: Verb, number: int) -> pb.SpeculatorState:
        about = {"speculator": self.speculator, "reason": self.reason}
        match verb:
            case Verb.PIN:
                return (await stub.Pin(pb.PinRequest(**about, version=number), timeout=TIMEOUT_S)).state
            case Verb.UNPIN:
                return (await stub.Unpin(pb.UnpinRequest(**about), timeout=TIMEOUT_S)).state
            case Verb.PROMOTE:
                return (await stub.Promote(pb.PromoteRequest(**about, version=number), timeout=TIMEOUT_S)).state
            case Verb.PAUSE:
                return (await stub.Pause(pb.PauseRequest(**about), timeout=TIMEOUT_S)).state
            case Verb.RESUME:
                return (await stub.Resume(pb.ResumeRequest(**about), timeout=TIMEOUT_S)).state

    def _speculators(self) -> tuple[Speculator, ...] | None:
        speculator = self.speculator if self.is_one else ""
        try:
            answer = self.call(lambda stub: client.listing(stub, speculator))
        except Unavailable:
            return None
        return tuple(
            wire.speculator(state, [v for v in answer.versions if v.manifest.speculator == state.speculator])
            for state in answer.speculators
        )

    def _snapshot(self, known: "dict[str, _Known]") -> Snapshot:
        name = self.speculator if self.is_one else ""

        async def ask(stub: "RegistryAsyncStub") -> tuple[SpeculatorSnapshot, ...]:
            states = (await stub.List(pb.ListRequest(speculator=name, page_size=1), timeout=TIMEOUT_S)).speculators
            return tuple(await asyncio.gather(*(_one(stub, state, known) for state in states)))

        speculators = self.call(ask)
        installation = replace(self.local(), speculators=tuple(one.speculator for one in speculators))
        return Snapshot(time=datetime.now(UTC), installation=installation, speculators=speculators)

    def _completions(self, speculator: str) -> pb.ListResponse:
        async def ask(stub: "RegistryAsyncStub") -> pb.ListResponse:
            async with asyncio.timeout(_COMPLETION_S):
                return await stub.List(pb.ListRequest(speculator=speculator, page_size=100), timeout=_COMPLETION_S)

        return self.call(ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Versions of a speculator as they were listed last."""

    key: object
    """Equal while no version has changed: its newest version, and the last change."""
    listed_s: float
    versions: list[pb.Version]


async def _one(stub: "RegistryAsyncStub", state: pb.SpeculatorState, known: dict[str, _Known]) -> SpeculatorSnapshot:
    """Return one speculator; all versions are listed only when one has changed, and sometimes for marks such as `retain`."""
    name = state.speculator
    history = client.history(stub, name, limit=_CONSOLE_HISTORY)
    transitions, (pods, problem) = await asyncio.gather(history, _pods(stub, name))
    last = transitions[-1].SerializeToString() if transitions else b""
    key, now_s = (state.latest, last), time.monotonic()
    before = known.get(name)
    if before is None or before.key != key or now_s - before.listed_s > _RELIST_S:
        versions = list((await client.listing(stub, name)).versions)
        before = known[name] = _Known(key=key, listed_s=now_s, versions=versions)
    return SpeculatorSnapshot(
        speculator=wire.speculator(state, before.versions),
        drafts=tuple(wire.draft(version, state) for version in before.versions),
        history=tuple(map(wire.history_entry, transitions)),
        pods=tuple(map(wire.pod, pods)),
        pods_problem=problem,
    )


async def _pods(stub: "RegistryAsyncStub", name: str) -> tuple[list[pb.PodState], str]:
    """Return the pods, or why they cannot be read: nothing else depends on them."""
    try:
        with rpc.errors():
            return await client.pods(stub, name), ""
    except UpdraftError as error:
        return [], str(error)


async def _status(stub: "RegistryAsyncStub", state: pb.SpeculatorState, number: int) -> RolloutStatus:
    """Return the rollout of a version; 0: of none."""
    if not number:
        return RolloutStatus.of(wire.speculator(state), None)
    version = await client.version(stub, state.speculator, number)
    was_stable = version.phase == pb.PHASE_SUPERSEDED and has_served(
        map(wire.history_entry, await client.history(stub, state.speculator, number))
    )
    return RolloutStatus.of(wire.speculator(state, [version]), wire.draft(version, state), has_served=was_stable)

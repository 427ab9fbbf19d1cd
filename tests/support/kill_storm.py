"""kill -9 of a registry at random moments, with pods connected and a publisher at work, and a look at what is left.

What has to hold after any number of kills: whatever was answered is there, with the same number and the same bytes; what a
dead registry left needs no more than a start to be whole; and no pod was ever ordered to serve what no decision said.
"""

import asyncio
import random
import struct
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.checkpoints import TARGET, Checkpoint, draft, evaluation, sha256
from tests.support.registry import CALL_S, RegistryProcess, fetch, found_again, publish, registry_stub, state
from tests.support.sim_pods import Behaviour, Order, Quality, SimPod, pods
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis import rpc
from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import InvalidInput, NotFound, UpdraftError
from updraft_registry.settings import RegistrySettings
from updraft_registry.storage.fsck import Finding, Kind
from updraft_registry.storage.maintenance import fsck, open_folder

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

NUM_PODS = 6

# Canaries of a few seconds, promoted and rolled back as their quality says: many kills fall into one.
POLICY = pb.RolloutPolicy(
    strategy=pb.STRATEGY_CANARY,
    steps=[pb.RolloutStep(pods_percent=30, hold_seconds=1), pb.RolloutStep(pods_percent=60, hold_seconds=1)],
    progress_deadline_seconds=20,
    analysis=pb.Analysis(interval_seconds=1, min_samples=20, comparison=pb.COMPARISON_PODS),
    revision_history_limit=3,
)

_SEATED = (pb.PHASE_STABLE, pb.PHASE_CANARY)

_TRANSIENT = (Kind.LEFTOVER, Kind.ROW, Kind.DOCUMENT)
"""What a kill may leave: a publication that ended early, or documents that are behind."""

_LIVES_S = (1.0, 2.0, 10.0)
"""A start takes one second, a canary about five."""

_PUBLISH_S = 0.3

_LATE_MS = 2000
"""A directive may be on its way while its version is condemned."""


@dataclass(slots=True)
class Seen:
    """What happened. The last three are what must not be."""

    kills: int = 0
    in_canary: int = 0
    """Kills while a canary ran."""
    interrupted: int = 0
    """Kills that left something for the next start to finish, of those that were looked at."""
    answered: dict[int, str] = field(default_factory=dict)
    """Digests by version, of publications that were answered."""
    phases: Counter[str] = field(default_factory=Counter)
    """Versions by their last phase."""
    orders: int = 0
    lost: list[str] = field(default_factory=list)
    """Answered publications that are not there, or have other bytes or another number."""
    torn: list[str] = field(default_factory=list)
    """States that no decision led to."""
    misled: list[str] = field(default_factory=list)
    """Orders to pods that no decision explains."""

    @property
    def problems(self) -> list[str]:
        """All that must not be."""
        return [*self.lost, *self.torn, *self.misled]


async def storm(folder: Path, *, kills: int, seed: int) -> Seen:
    """Kill a registry so many times, during its start or seconds later; return what was seen."""
    rng, seen = random.Random(seed), Seen()
    with RegistryProcess(folder, settle_seconds=0.5, log_level="WARNING") as process:
        async with pods(process.address, NUM_PODS, _behaviour(seed)) as fleet:
            async with _publishing(process, seen):
                for _ in range(kills):
                    await asyncio.sleep(rng.uniform(0.0, rng.choice(_LIVES_S)))
                    seen.kills += 1
                    seen.in_canary += any(pod.directive.serve_phase == pb.PHASE_CANARY for pod in fleet)
                    process.kill()
                    if rng.random() < 0.5:  # looking tidies up a little; so every other start finds it as it was left
                        _look_at_the_dead(process, seen)
                    process.spawn()
                await until(lambda: process.fetch("/readyz") == "ready\n", what="the registry is ready")
            await _look_at_the_living(process, fleet, seen)
        process.terminate()
        seen.torn += [f"at the end: {finding}" for finding in _damage(process)]
    return seen


def _behaviour(seed: int) -> Behaviour:
    """Every third version is worse than all before, the others better."""
    return Behaviour(
        target=TARGET,
        report_s=0.3,
        requests_per_s=60.0,
        quality=lambda version: Quality(acceptance_length=2.0 + 0.5 * version if version % 3 else 1.2),
        seed=seed,
    )


@asynccontextmanager
async def _publishing(process: RegistryProcess, seen: Seen) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        publishing = tasks.create_task(_publish_on(process, seen))
        try:
            yield
        finally:
            publishing.cancel()


async def _publish_on(process: RegistryProcess, seen: Seen) -> None:
    """The wish for canaries, and then one draft after another, each until it is answered."""
    async with rpc.channel(process.address) as channel:
        stub, seed, is_wished = registry_stub(channel), 1, False
        while True:
            try:
                if not is_wished:
                    with rpc.errors():
                        await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=POLICY), timeout=CALL_S)
                    is_wished = True
                await _publish_one(stub, _weights(seed), seen)
                seed += 1
                await asyncio.sleep(_PUBLISH_S)
            except UpdraftError:
                await found_again(channel)


def _weights(seed: int) -> Checkpoint:
    """A mebibyte of one small number: it takes a while to send."""
    return draft(seed, fc=struct.pack("<H", 0x3C00 + seed % 0x400) * 2**19)


async def _publish_one(stub: "RegistryAsyncStub", weights: Checkpoint, seen: Seen) -> None:
    stable = (await state(stub)).stable
    answer = await publish(stub, weights, source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=stable))
    number, digest = answer.version.version, weights.digest
    if seen.answered.setdefault(number, digest) != digest:
        seen.lost.append(f"version {number} was given to {seen.answered[number]} and to {digest}")


def _look_at_the_dead(process: RegistryProcess, seen: Seen) -> None:
    found = _damage(process)
    seen.interrupted += bool(found)
    torn = [f for f in found if f.kind not in _TRANSIENT or "cannot be read" in f.why]
    seen.torn += [f"after kill {seen.kills}: {finding}" for finding in torn]


def _damage(process: RegistryProcess) -> list[Finding]:
    try:
        with open_folder(RegistrySettings(data_dir=process.data), SystemClock()) as folder:
            outcome = fsck(folder, is_repairing=False, is_hashing=True, progress=lambda _done, _total: None)
    except InvalidInput:  # killed before it had made its folder
        return []
    return [finding for finding in outcome.found if finding.is_damage]


async def _look_at_the_living(process: RegistryProcess, fleet: Sequence[SimPod], seen: Seen) -> None:
    async with rpc.channel(process.address) as channel:
        stub = registry_stub(channel)
        await found_again(channel)
        await until(lambda: _all_serve(stub, fleet), what="every pod serves the stable version or the candidate")
        listed = await stub.List(pb.ListRequest(speculator="default", page_size=1000), timeout=CALL_S)
        versions = {version.version: version for version in listed.versions}
        seen.phases = Counter(pb.Phase.Name(version.phase) for version in listed.versions)
        _look_at_versions(versions, seen)
        seen.misled += [
            f"{pod.name} was ordered {order}, which nobody published"
            for pod in fleet
            for order in pod.directives
            if order.version and order.version not in versions
        ]
        for number, version in versions.items():
            await _look_at_weights(stub, number, version.manifest.digest, seen)
            told = await stub.History(
                pb.HistoryRequest(speculator="default", version=number, limit=1000), timeout=CALL_S
            )
            for pod in fleet:
                orders = [order for order in pod.directives if order.version == number]
                seen.orders += len(orders)
                seen.misled += [
                    f"{pod.name} was ordered {order}; the history is {told.transitions}"
                    for order in orders
                    if order.digest != version.manifest.digest or not _is_explained(order, told.transitions)
                ]


def _look_at_versions(versions: dict[int, pb.Version], seen: Seen) -> None:
    if sorted(versions) != list(range(1, len(versions) + 1)):
        seen.torn.append(f"numbers have gaps: {sorted(versions)}")
    for number, digest in seen.answered.items():
        known = versions.get(number)
        if known is None or known.manifest.digest != digest:
            seen.lost.append(f"version {number} was answered with {digest} and is lost")
    for phase in _SEATED:
        if sum(version.phase == phase for version in versions.values()) > 1:
            seen.torn.append(f"more than one version is {pb.Phase.Name(phase)}")


async def _look_at_weights(stub: "RegistryAsyncStub", number: int, digest: str, seen: Seen) -> None:
    try:
        data = await fetch(stub, number)
    except NotFound:  # retention
        return
    if sha256(data) != digest:
        seen.lost.append(f"the weights of version {number} are not {digest}")


def _is_explained(order: Order, history: Sequence[pb.Transition]) -> bool:
    """Whether the version had a seat when it was ordered, or a moment before. `history` is newest first."""
    until_ms = order.at_ms
    ended_ms = 2**62
    for event in history:
        if event.to_phase in _SEATED and event.unix_ms <= until_ms and ended_ms > until_ms - _LATE_MS:
            return True
        if event.to_phase:
            ended_ms = event.unix_ms
    return False


async def _all_serve(stub: "RegistryAsyncStub", fleet: Sequence[SimPod]) -> bool:
    now = await state(stub)
    return all(pod.loaded.version in (now.stable, now.candidate) for pod in fleet)

"""The Lease: one holder at a time, whatever is delayed, lost or killed; given back at the end."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.wait import until
from tests.unit.operator.memory_cluster import MemoryCluster
from tests.unit.operator.virtual_time import LoopClock, run

from updraft_chassis.errors import Conflict, NotFound, Unavailable, UpdraftError
from updraft_chassis.lifecycle import Stop
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.watching.leader import TRUST, AlwaysLeader, Lease, LeaseName

LEASE_S = 12.0
WHERE = ("Lease", "updraft-system", "updraft-operator")


class Wire(MemoryCluster):
    """A cluster that is reached over a network, maybe a bad one: requests and answers come late or never, and a request
    that nobody waits for any more is still on its way."""

    def __init__(self, server: MemoryCluster) -> None:
        super().__init__()
        self._server = server
        self.is_cut = self.is_bad = False
        self.rng = random.Random(0)
        self.tasks: asyncio.TaskGroup | None = None

    async def get(self, kind: str, namespace: str, name: str) -> Manifest:
        return await self._sent(lambda: self._server.get(kind, namespace, name))

    async def create(self, content: Manifest) -> Manifest:
        return await self._sent(lambda: self._server.create(content))

    async def replace(self, content: Manifest) -> Manifest:
        return await self._sent(lambda: self._server.replace(content))

    async def _sent(self, request: Callable[[], Awaitable[Manifest]]) -> Manifest:
        if self.tasks is None:
            return await self._there_and_back(request)
        answer = await asyncio.shield(self.tasks.create_task(self._outcome(request)))
        if isinstance(answer, UpdraftError):
            raise answer
        return answer

    async def _outcome(self, request: Callable[[], Awaitable[Manifest]]) -> Manifest | UpdraftError:
        try:
            return await self._there_and_back(request)
        except UpdraftError as error:
            return error

    async def _there_and_back(self, request: Callable[[], Awaitable[Manifest]]) -> Manifest:
        await self._travel()
        answer = await request()
        await self._travel()
        return answer

    async def _travel(self) -> None:
        if self.is_cut:
            raise Unavailable("no route")
        if self.is_bad:
            await asyncio.sleep(self.rng.choice([0.0, 0.0, 0.0, 0.01, 0.1, 0.5, 8.0]))
            if self.rng.random() < 0.05:
                raise Unavailable("cut off")


@dataclass(slots=True)
class Replica:
    """One process of several."""

    lease: Lease
    wire: Wire
    stop: Stop = field(default_factory=Stop)
    changes: list[bool] = field(default_factory=list)


def replica(server: MemoryCluster, identity: str) -> Replica:
    wire = Wire(server)
    name = LeaseName(namespace=WHERE[1], name=WHERE[2], identity=identity, seconds=LEASE_S)
    changes: list[bool] = []
    lease = Lease(wire, name, LoopClock(), changes.append)
    return Replica(lease=lease, wire=wire, changes=changes)


def holder(server: MemoryCluster) -> str:
    return str(server.objects[WHERE]["spec"]["holderIdentity"])


def both(server: MemoryCluster) -> tuple[Replica, Replica]:
    return replica(server, "a"), replica(server, "b")


async def _with(replicas: list[Replica], story: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for each in replicas:
            tasks.create_task(each.lease.run(each.stop))
        await story()
        for each in replicas:
            each.stop.request()


def test_the_first_of_two_leads_and_the_other_stands_by() -> None:
    async def main() -> None:
        server = MemoryCluster()
        first, second = both(server)

        async def story() -> None:
            await asyncio.sleep(100.0)
            assert first.lease.is_held
            assert not second.lease.is_held
            assert (first.changes, second.changes) == ([True], [])
            first.lease.check()
            with pytest.raises(Unavailable, match="does not hold the Lease"):
                second.lease.check()

        await _with([first, second], story)

    run(main())


def test_what_is_given_back_is_taken_at_once() -> None:
    async def main() -> None:
        server = MemoryCluster()
        first, second = both(server)

        async def story() -> None:
            await asyncio.sleep(5.0)
            first.stop.request()
            await asyncio.sleep(LEASE_S / 5 + 0.1)
            assert second.lease.is_held
            assert server.objects[WHERE]["spec"]["leaseTransitions"] == 2
            assert not first.lease.is_held

        await _with([first, second], story)
        assert holder(server) == ""

    run(main())


def test_a_killed_leader_is_succeeded_within_its_lease_and_two_looks() -> None:
    async def main() -> None:
        server = MemoryCluster()
        first, second = both(server)
        async with asyncio.TaskGroup() as tasks:
            killed = tasks.create_task(first.lease.run(first.stop))
            await asyncio.sleep(1.0)
            tasks.create_task(second.lease.run(second.stop))
            await asyncio.sleep(30.0)
            killed.cancel()
            died_s = LoopClock().monotonic()
            await until(lambda: second.lease.is_held)
            took_s = LoopClock().monotonic() - died_s
            assert LEASE_S * 0.7 < took_s < LEASE_S + 2 * LEASE_S / 5 + 0.2
            second.stop.request()

    run(main())


def test_who_is_cut_off_stops_before_another_may_start() -> None:
    async def main() -> None:
        server = MemoryCluster()
        first, second = both(server)

        async def story() -> None:
            await asyncio.sleep(10.0)
            first.wire.is_cut = True
            stopped_s = started_s = 0.0
            for _ in range(400):
                await asyncio.sleep(0.1)
                assert not (first.lease.is_held and second.lease.is_held)
                stopped_s = stopped_s or (0.0 if first.lease.is_held else LoopClock().monotonic())
                started_s = started_s or (LoopClock().monotonic() if second.lease.is_held else 0.0)
            assert 0 < stopped_s < started_s
            assert first.changes == [True, False]

        await _with([first, second], story)

    run(main())


def test_a_lease_that_lapsed_between_two_renewals_is_told_as_lost_and_taken_again() -> None:
    alone = replica(MemoryCluster(), "a")

    async def story() -> None:
        await asyncio.sleep(0.1)
        alone.wire.is_cut = True
        await asyncio.sleep(TRUST * LEASE_S)
        alone.wire.is_cut = False
        assert not alone.lease.is_held
        assert alone.changes == [True], "it lapsed between two looks"
        await asyncio.sleep(LEASE_S)
        assert alone.changes == [True, False, True]

    run(_with([alone], story))


def test_a_process_that_comes_again_under_its_name_need_not_wait() -> None:
    async def main() -> None:
        server = MemoryCluster()
        first, again = replica(server, "a"), replica(server, "a")
        async with asyncio.TaskGroup() as tasks:
            killed = tasks.create_task(first.lease.run(first.stop))
            await asyncio.sleep(1.0)
            killed.cancel()
            tasks.create_task(again.lease.run(again.stop))
            await asyncio.sleep(0.1)
            assert again.lease.is_held
            assert server.objects[WHERE]["spec"]["leaseTransitions"] == 1
            again.stop.request()

    run(main())


def test_one_process_alone_always_leads() -> None:
    AlwaysLeader().check()
    assert AlwaysLeader().is_held


class Fleet:
    """Replicas on a bad network, which are cut off, stopped, killed and replaced."""

    def __init__(self, tasks: asyncio.TaskGroup, rng: random.Random) -> None:
        self._tasks, self._rng, self._server = tasks, rng, MemoryCluster()
        self._alive: dict[str, tuple[Replica, asyncio.Task[None]]] = {}
        self._stopped: list[Replica] = []

    def start(self, identity: str) -> None:
        made = replica(self._server, identity)
        made.wire.is_bad, made.wire.rng, made.wire.tasks = True, random.Random(self._rng.random()), self._tasks
        self._alive[identity] = made, self._tasks.create_task(made.lease.run(made.stop))

    def disturb(self, number: int) -> None:
        identity = self._rng.choice(sorted(self._alive))
        each, task = self._alive[identity]
        what = self._rng.choice(["kill", "stop", "cut", "heal"])
        each.wire.is_cut = what == "cut"
        if what == "kill":
            task.cancel()
        elif what == "stop":
            each.stop.request()
            self._stopped.append(each)
        if what in ("kill", "stop"):
            del self._alive[identity]
            self.start(f"replica-{number}")

    def heal(self) -> None:
        for each, _ in self._alive.values():
            each.wire.is_cut = each.wire.is_bad = False

    def stop(self) -> None:
        for each, _ in self._alive.values():
            each.stop.request()

    def num_held(self) -> int:
        """Who may write now; who was killed writes no more."""
        return sum(each.lease.is_held for each in (*self._stopped, *(each for each, _ in self._alive.values())))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), num=st.integers(2, 4))
def test_two_leases_are_never_held_at_once(seed: int, num: int) -> None:
    """Delays longer than a request may take, answers that are lost after the write; and once all is well, one leads."""

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            fleet = Fleet(tasks, random.Random(seed))
            for number in range(num):
                fleet.start(f"replica-{number}")
            for moment in range(400):
                await asyncio.sleep(0.25)
                assert fleet.num_held() <= 1
                if moment % 40 == 39:
                    fleet.disturb(moment)
            fleet.heal()
            await asyncio.sleep(3 * LEASE_S)
            assert fleet.num_held() == 1
            fleet.stop()

    run(main())


# What the Lease asks of a cluster, kept by the one that stands in here; the real one is asked in tests/cluster.


@pytest.mark.parametrize("act", ["replace", "create"])
async def test_of_two_writers_the_second_is_told(act: str) -> None:
    server = MemoryCluster()
    body = {"kind": "Lease", "metadata": {"name": WHERE[2], "namespace": WHERE[1]}, "spec": {"x": 1}}
    made = await server.create(body)
    write = partial(server.create, body) if act == "create" else partial(server.replace, {**made, "spec": {"x": 3}})
    await server.replace({**made, "spec": {"x": 2}})
    with pytest.raises(Conflict):
        await write()


async def test_what_is_not_there_is_not_found() -> None:
    with pytest.raises(NotFound):
        await MemoryCluster().get(*WHERE)

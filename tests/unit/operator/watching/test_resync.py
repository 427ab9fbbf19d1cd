"""What a watch has missed is found by a listing, and what only lags is left alone."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.operator.memory_cluster import MemoryCluster
from tests.unit.operator.virtual_time import LoopClock, run

from updraft_chassis.errors import Forbidden, Unavailable, UpdraftError
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.watching.cluster import KINDS
from updraft_operator.watching.resync import FIRST_S, GRACE_S, Resync
from updraft_operator.watching.store import Store

QWEN = Key("team", "qwen")


class World:
    """A cluster, what the watches told of it, and who compares."""

    def __init__(self, *namespaces: str) -> None:
        self.cluster, self.store, self.added = MemoryCluster(), Store(), list[Key]()
        self.counted = CollectorRegistry()
        self.resync = Resync(self.store, self.cluster, LoopClock(), Metrics(self.counted), namespaces)
        self.is_watching = True
        self.cluster.watchers.append(self._watch)

    def _watch(self, kind: str, body: Manifest, is_deleted: bool) -> None:  # noqa: FBT001 - a Watcher
        if self.is_watching:
            self.tell(kind, body, is_deleted=is_deleted)

    def tell(self, kind: str, body: Manifest, *, is_deleted: bool = False) -> None:
        if is_deleted:
            self.store.drop(kind, QWEN, body["metadata"]["name"], body["metadata"]["resourceVersion"])
        else:
            self.store.put(kind, body)

    def num_missed(self, kind: str) -> float:
        labels = {"kind": kind}
        return self.counted.get_sample_value("updraft_operator_stale_objects_total", labels) or 0.0

    async def once(self) -> float:
        """Compare; how long it took."""
        started_s = LoopClock().monotonic()
        await self.resync.run_once(self.added.append)
        return LoopClock().monotonic() - started_s


def _config_map(name: str = "qwen-serving", **metadata: Any) -> Manifest:
    labels = {names.SPECULATOR: "qwen", names.MANAGED_BY: names.MANAGER}
    return {"kind": "ConfigMap", "metadata": {"name": name, "namespace": "team", "labels": labels, **metadata}}


WHERE = ("ConfigMap", "team", "qwen-serving")


def test_where_all_agree_nothing_is_waited_for() -> None:
    async def main() -> None:
        world = World()
        assert (world.resync.age_s, world.resync.synced_s) == (0.0, None), "no time counts before it begins"
        world.resync.begin(KINDS)
        world.cluster.set(_config_map())
        assert await world.once() == 0.0
        assert world.added == []
        await asyncio.sleep(5.0)
        assert world.resync.age_s == 5.0

    run(main())


def test_before_the_first_listing_the_age_counts_from_the_beginning() -> None:
    async def main() -> None:
        world = World()
        world.resync.begin(KINDS)
        await asyncio.sleep(7.0)
        assert (world.resync.age_s, world.resync.agreed_age_s) == (7.0, 7.0)

    run(main())


def test_a_watch_that_misses_something_every_time_is_counted_in_a_row() -> None:
    async def main() -> None:
        world = World()
        world.cluster.set(_config_map())
        await world.once()
        world.is_watching = False
        for number in (1, 2):
            await asyncio.sleep(10.0)
            _changed(world, str(number))
            await world.once()
            assert world.resync.num_missed == number
            assert world.resync.agreed_age_s > world.resync.age_s
        await world.once()
        assert world.resync.num_missed == 0

    run(main())


def test_what_was_missed_and_cannot_be_read_is_no_listing() -> None:
    class Halfway(MemoryCluster):
        async def get(self, kind: str, namespace: str, name: str) -> Manifest:
            raise Unavailable(f"no answer for {kind} {namespace}/{name}")

    async def main() -> None:
        cluster = Halfway()
        cluster.set(_config_map())
        resync = Resync(Store(), cluster, LoopClock(), Metrics(CollectorRegistry()), ())
        with pytest.raises(Unavailable, match="a watch missed a change of ConfigMap team/qwen-serving"):
            await resync.run_once(lambda _: None)
        assert resync.synced_s is None

    run(main())


def _gone(world: World) -> None:
    world.cluster.remove(WHERE)


def _changed(world: World, value: str = "x") -> None:
    world.cluster.edit(WHERE, lambda body: body.update(data={"x": value}))


def _new(world: World) -> None:
    world.cluster.set(_config_map("qwen-trainer"))


@pytest.mark.parametrize("change", [_gone, _changed, _new])
def test_what_a_watch_missed_is_mended_after_a_grace(change: Callable[[World], None]) -> None:
    async def main() -> None:
        world = World()
        world.cluster.set(_config_map())
        await world.once()
        world.is_watching = False
        change(world)
        assert GRACE_S <= await world.once() <= GRACE_S + 1.0
        assert world.added == [QWEN]
        assert world.num_missed("ConfigMap") == 1
        held = {("team", each["metadata"]["name"]): each for each in world.cluster.of("ConfigMap")}
        known = world.store.versions("ConfigMap")
        assert known == {name: each["metadata"]["resourceVersion"] for name, each in held.items()}
        assert await world.once() == 0.0

    run(main())


def test_a_watch_that_only_lags_is_waited_for() -> None:
    async def main() -> None:
        world = World()
        world.cluster.set(_config_map())
        await world.once()
        world.is_watching = False
        _changed(world)

        async def late() -> None:
            await asyncio.sleep(1.5)
            world.tell("ConfigMap", await world.cluster.get(*WHERE))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(late())
            assert await world.once() < GRACE_S
        assert world.added == []
        assert world.num_missed("ConfigMap") == 0

    run(main())


def test_the_first_time_the_watches_have_more_time() -> None:
    async def main() -> None:
        world = World()
        world.is_watching = False
        world.cluster.set(_config_map())
        assert FIRST_S <= await world.once() <= FIRST_S + 1.0
        assert world.added == [QWEN]

    run(main())


def test_the_first_time_the_watches_have_as_long_as_they_go_on_telling() -> None:
    """Thousands of objects on a busy machine: none of them is read one by one, and nothing is listed again for them."""

    async def main() -> None:
        world = World()
        world.is_watching = False
        for number in range(300):
            world.cluster.set(_config_map(f"c-{number}"))

        async def slow() -> None:
            for each in world.cluster.of("ConfigMap"):
                await asyncio.sleep(0.9)
                world.tell("ConfigMap", each)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(slow())
            assert await world.once() > 2 * FIRST_S
        assert world.added == []
        assert world.cluster.num_listings < 20

    run(main())


def test_what_is_gone_before_the_watch_told_of_it_is_not_waited_for() -> None:
    async def main() -> None:
        world = World()
        world.is_watching = False
        world.cluster.set(_config_map())

        async def removed() -> None:
            await asyncio.sleep(0.5)
            world.cluster.remove(WHERE)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(removed())
            assert await world.once() <= 2.0
        assert world.num_missed("ConfigMap") == 0

    run(main())


def test_other_differences_meanwhile_are_no_lasting_ones() -> None:
    """Each listing finds another object that the watch has not told yet: none of them is missed."""

    async def main() -> None:
        world = World()
        await world.once()
        world.is_watching = False
        reported: list[Manifest] = []

        async def busy() -> None:
            for number in range(10):
                world.cluster.set(_config_map(f"c-{number}"))
                reported.append(await world.cluster.get("ConfigMap", "team", f"c-{number}"))
                await asyncio.sleep(0.5)
                world.tell("ConfigMap", reported[-1])

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(busy())
            await asyncio.sleep(0.1)
            await world.once()
        assert world.added == []

    run(main())


def test_what_the_store_knows_better_is_no_news() -> None:
    async def main() -> None:
        world = World()
        world.cluster.set(_config_map())
        body = await world.cluster.get(*WHERE)
        body["metadata"]["resourceVersion"] = "999999"
        world.tell("ConfigMap", body)
        assert await world.once() == 0.0

    run(main())


def test_what_nobody_owns_is_no_news() -> None:
    async def main() -> None:
        world = World()
        world.cluster.set(_config_map(labels={names.MANAGED_BY: names.MANAGER}))
        assert await world.once() == 0.0

    run(main())


def test_only_the_namespaces_that_are_looked_after_are_listed() -> None:
    async def main() -> None:
        world = World("team")
        world.is_watching = False
        elsewhere = _config_map()
        elsewhere["metadata"]["namespace"] = "elsewhere"
        world.cluster.set(elsewhere)
        assert await world.once() == 0.0
        assert world.store.all_keys() == []

    run(main())


def test_a_listing_that_fails_is_none() -> None:
    class Away(MemoryCluster):
        async def metadata(self, kind: str, namespace: str) -> list[Manifest]:
            raise Unavailable(f"{kind} of {namespace} cannot be listed")

    async def main() -> None:
        resync = Resync(Store(), Away(), LoopClock(), Metrics(CollectorRegistry()), ())
        with pytest.raises(Unavailable):
            await resync.run_once(lambda _: None)
        assert resync.synced_s is None

    run(main())


def test_an_outage_of_the_api_server_is_no_reason_to_restart_and_other_refusals_are() -> None:
    async def refuse(error: UpdraftError) -> float:
        """The age after an hour in which each listing ends so."""

        async def fail(kind: str, namespace: str) -> list[Manifest]:
            raise error

        world = World()
        world.resync.begin(KINDS)
        world.cluster.metadata = fail  # type: ignore[method-assign]
        for _ in range(60):
            with pytest.raises(type(error)):
                await world.once()
            await asyncio.sleep(60.0)
        return world.resync.age_s

    async def main() -> None:
        assert await refuse(Unavailable("no answer from the API server")) == 60.0
        assert await refuse(Forbidden("no right to list")) == 3600.0

    run(main())

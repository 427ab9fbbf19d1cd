"""At-least-once, over random histories of two consumers that read, acknowledge, crash and take over."""

import asyncio
import itertools
from dataclasses import dataclass, field
from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.redis_server import RedisServer

from updraft_chassis import streams
from updraft_chassis.streams import Entry, Producer
from updraft_chassis.streams.consumer import Consumer

NOW = timedelta(0)
LATER = timedelta(hours=1)
_keys = itertools.count()

names = st.sampled_from(["a", "b"])
steps = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 5)),
    st.tuples(st.just("read"), names, st.integers(1, 4)),
    st.tuples(st.just("ack"), names, st.integers(1, 4)),
    st.tuples(st.just("crash"), names),
    st.tuples(st.just("lose reply"), names, st.integers(1, 3)),
)


@dataclass
class History:
    """What happened to one stream, and what must hold at every step."""

    client: streams.Client
    key: str
    claim_idle: timedelta
    appended: list[bytes] = field(default_factory=list)
    acknowledged: set[str] = field(default_factory=set)
    effects: set[bytes] = field(default_factory=set)
    lives: dict[str, Consumer] = field(default_factory=dict)
    in_hand: dict[str, list[Entry]] = field(default_factory=dict)

    async def append(self, count: int) -> None:
        producer = Producer(self.client, self.key, max_bytes=1 << 20)
        for _ in range(count):
            self.appended.append(b"entry %d" % len(self.appended))
            await producer.append(self.appended[-1])

    async def crash(self, name: str) -> None:
        life = Consumer(self.client, self.key, group="g", name=name, claim_idle=self.claim_idle, max_deliveries=10_000)
        await life.open()
        self.lives[name], self.in_hand[name] = life, []

    async def read(self, name: str, count: int) -> int:
        entries = await self.lives[name].read(count=count, block=NOW)
        assert len(entries) <= count
        ids = {entry.id for entry in entries}
        assert len(ids) == len(entries)
        assert not ids & {entry.id for entry in self.in_hand[name]}, "delivered what is in hand"
        assert not ids & self.acknowledged, "delivered what was settled"
        self.effects |= {bytes(entry.data) for entry in entries}
        self.in_hand[name] += entries
        return len(entries)

    async def ack(self, name: str, count: int) -> None:
        done, self.in_hand[name] = self.in_hand[name][:count], self.in_hand[name][count:]
        await self.lives[name].ack([entry.id for entry in done])
        self.acknowledged |= {entry.id for entry in done}

    async def lose_reply(self, name: str, count: int) -> None:
        """The server delivers, the connection breaks, and the consumer dies of it."""
        await self.client.xreadgroup("g", name, {self.key: ">"}, count=count)
        await self.crash(name)

    async def do(self, step: tuple[str, *tuple[object, ...]]) -> None:
        verb, *arguments = step
        await getattr(self, verb.replace(" ", "_"))(*arguments)

    async def drain(self) -> None:
        """The survivor "a" handles all that is left."""
        self.claim_idle = NOW
        await self.crash("b")
        await self.crash("a")
        while await self.read("a", 3):
            await self.ack("a", 3)


@settings(max_examples=60, deadline=None)
@given(script=st.lists(steps, max_size=40), claim_idle=st.sampled_from([NOW, LATER]))
def test_every_entry_takes_effect_and_is_settled_whatever_happens(
    redis_server: RedisServer, script: list[tuple[str, *tuple[object, ...]]], claim_idle: timedelta
) -> None:
    async def live() -> None:
        async with streams.connect(redis_server.url) as client:
            history = History(client, f"property:{next(_keys)}", claim_idle)
            await history.crash("a")
            await history.crash("b")
            for step in script:
                await history.do(step)
            await history.drain()
            assert history.effects == set(history.appended)
            assert len(history.acknowledged) == len(history.appended)
            assert await client.xlen(history.key) == 0
            assert (await client.xpending(history.key, "g"))["pending"] == 0
            assert await client.exists(f"{history.key}:dead") == 0

    asyncio.run(live())

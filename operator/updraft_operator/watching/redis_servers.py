"""All Redis whose users the operator makes: its own, and one for each speculator with a dedicated one.

Each is compared on its own, so that one that hangs delays no other.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Self, TypeAlias

from updraft_chassis.errors import Unavailable
from updraft_operator.manifests.dedicated import redis as dedicated
from updraft_operator.manifests.redis import Place, stream_namespace
from updraft_operator.manifests.redis_users import RedisUser, with_authorities
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import Observed, UsersProblem
from updraft_operator.planning.plan import Plan
from updraft_operator.watching.redis_users import RedisUsers

Url: TypeAlias = Callable[[], str]


@dataclass(slots=True, kw_only=True)
class DedicatedRedis:
    """How the operator reaches the Redis of one speculator."""

    key: bytes = field(default=b"", repr=False)
    """The passwords of administrators follow from it; empty until it was read."""
    address: str
    """Template, with {name} and {namespace}."""
    has_tls: bool = False

    def url(self, key: Key) -> str:
        """Empty without a key."""
        return dedicated.url(self.key, self.address, *key, has_tls=self.has_tls) if self.key else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedUsers:
    """The wishes of one speculator for all Redis."""

    shared: tuple[RedisUser, ...] = ()
    dedicated: tuple[RedisUser, ...] = ()
    dedicated_url: str = field(default="", repr=False)
    """With the administrator, and the CAs if it speaks TLS; empty until they are known."""
    streams: str = ""
    """The namespace of its streams."""
    is_moving: bool = False
    reads: Place | None = None
    drains: Place | None = None
    """Where its traces are to be counted."""
    leaves_shared: bool = False
    """Its streams on the operator's Redis are deleted with its last user there."""

    @classmethod
    def of(cls, observed: Observed, plan: Plan) -> Self:
        return cls(
            shared=plan.users or (),
            dedicated=plan.dedicated_users,
            dedicated_url=_for_operator(observed),
            streams=stream_namespace(observed.speculator, observed.config),
            is_moving=plan.is_moving,
            reads=plan.reads,
            drains=plan.drains,
            leaves_shared=plan.leaves_shared,
        )

    def drained(self, place: Place) -> str:
        return self.streams if self.drains is place else ""


def _for_operator(observed: Observed) -> str:
    if not observed.dedicated_url.startswith("rediss:"):
        return observed.dedicated_url
    trusted = observed.config.tls.authorities
    return with_authorities(observed.dedicated_url, trusted) if trusted else ""


class RedisServers:
    """`make` makes the users of the Redis with this administrator's address, which may change, and of this `tenant`;
    `shared_url` is that of the operator's Redis, None without one."""

    def __init__(self, make: Callable[..., RedisUsers], shared_url: Url | None) -> None:
        self._make = make
        self._shared = make(shared_url) if shared_url is not None else None
        self._dedicated: dict[Key, RedisUsers] = {}
        self._urls: dict[Key, str] = {}
        self._reads: dict[Key, Place | None] = {}
        self._changed = asyncio.Event()
        self._is_closed = False

    def want(self, key: Key, wants: WantedUsers) -> None:
        """The users of a speculator from now on. Without users on a dedicated Redis, it has none."""
        is_moving = wants.is_moving
        self._reads[key] = wants.reads
        if self._shared is not None:
            leaves = wants.streams if wants.leaves_shared else ""
            self._shared.want(key, wants.shared, drains=wants.drained(Place.SHARED), leaves=leaves, is_moving=is_moving)
        if not wants.dedicated:
            self._drop(key)
            return
        self._urls[key] = wants.dedicated_url
        if key not in self._dedicated:
            self._dedicated[key] = self._make(partial(self._url, key), tenant=key)
            self._changed.set()
        self._dedicated[key].want(key, wants.dedicated, drains=wants.drained(Place.DEDICATED), is_moving=is_moving)

    def forget(self, key: Key) -> None:
        """The speculator is gone."""
        self._reads.pop(key, None)
        if self._shared is not None:
            self._shared.forget(key)
        self._drop(key)

    def start_over(self) -> None:
        """Forget who wants which users. While another replica leads, nobody tells this one what has changed."""
        for server in self._all():
            server.start_over()

    def problem(self, key: Key) -> UsersProblem | None:
        """Why a user of the speculator is not known to be right, on the Redis that its trainer reads; None if all are, or if
        nothing was tried yet. A move waits for the other Redis, and the trainer works meanwhile."""
        server = self._servers(key).get(self._reads.get(key) or Place.SHARED)
        return server.problem(key) if server is not None else None

    def ready_places(self, key: Key) -> frozenset[Place]:
        """Redis that answer and have the users of the speculator."""
        return frozenset(place for place, server in self._servers(key).items() if server.are_right(key))

    def right(self, key: Key) -> frozenset[RedisUser]:
        """The users that are right, on all Redis of the speculator."""
        return frozenset[RedisUser]().union(*(server.right(key) for server in self._of(key)))

    def unread(self, key: Key) -> int | None:
        """Traces of a speculator where it drains; None if they were not counted yet."""
        return next((unread for server in self._of(key) if (unread := server.unread(key)) is not None), None)

    def max_memory(self, key: Key) -> int:
        """Bytes that the Redis of a speculator may use; 0 without a limit, or if it did not say so."""
        server = self._dedicated.get(key, self._shared)
        return server.max_memory if server is not None else 0

    def close(self) -> None:
        """End `run` after what it does now."""
        self._is_closed = True
        for server in self._all():
            server.close()
        self._changed.set()

    async def run(self) -> None:
        """Until `close`."""
        async with asyncio.TaskGroup() as tasks:
            running = dict[RedisUsers, asyncio.Task[None]]()
            while not self._is_closed:
                self._changed.clear()
                running = {server: task for server, task in running.items() if not task.done()}
                for server in self._all():
                    if server not in running:
                        running[server] = tasks.create_task(server.run())
                await self._changed.wait()

    def _url(self, key: Key) -> str:
        """The newest address, because its CAs change. Unavailable until they are known."""
        if not self._urls.get(key):
            raise Unavailable("the CA of this Redis is not known yet")
        return self._urls[key]

    def _drop(self, key: Key) -> None:
        self._urls.pop(key, None)
        server = self._dedicated.pop(key, None)
        if server is not None:
            server.close()

    def _all(self) -> Iterator[RedisUsers]:
        if self._shared is not None:
            yield self._shared
        yield from self._dedicated.values()

    def _of(self, key: Key) -> Iterator[RedisUsers]:
        yield from self._servers(key).values()

    def _servers(self, key: Key) -> dict[Place, RedisUsers]:
        known = {Place.SHARED: self._shared, Place.DEDICATED: self._dedicated.get(key)}
        return {place: server for place, server in known.items() if server is not None}

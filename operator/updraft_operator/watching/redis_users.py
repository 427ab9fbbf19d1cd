"""Makes the users of speculators on the operator's Redis, repairs them, and deletes those of resources that are gone.

Redis forgets its users when it restarts without an aclfile, the nodes of a cluster do not share them, and nobody is told. So
one task compares all users with the wanted ones every few seconds, on every node. Reconciliations say which users they want
and never wait for Redis.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from redis.asyncio.cluster import RedisCluster

from updraft_chassis import streams
from updraft_chassis.errors import Unavailable, UpdraftError
from updraft_operator.manifests.redis_users import RedisUser, speculator_of
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import UsersProblem

logger = logging.getLogger(__name__)

Run: TypeAlias = Callable[..., Awaitable[Any]]
"""Runs a command on one node."""

_NODE_S = 30.0
"""A node that takes longer does not keep the others waiting; making 2,000 users takes less than a second."""

_LOG = "; the reason is in the operator's log"
_UNREACHABLE = UsersProblem(
    reason="RedisUnreachable",
    message=f"the operator cannot make the users of pods and trainer, because its Redis does not answer{_LOG}",
)
_REFUSED = UsersProblem(
    reason="RedisUsersRefused",
    message=f"the operator cannot make the users of pods and trainer, because its Redis refuses its commands{_LOG}",
)


@dataclass(frozen=True, slots=True)
class _Listed:
    """A user as a node lists it: passwords apart from everything else, whose text depends on the version of Redis."""

    password_hashes: frozenset[str]
    rest: tuple[str, ...]


class RedisUsers:
    """`url` says how to reach Redis now, or raises Unavailable. `may_write` is whether this process leads and knows all
    speculators; `is_gone` whether one does not exist; `notify` is told about a speculator whose problem changed."""

    def __init__(  # noqa: PLR0913 - what it asks and tells
        self,
        url: Callable[[], str],
        installation: str,
        *,
        period_s: float,
        may_write: Callable[[], bool],
        is_gone: Callable[[Key], bool],
        notify: Callable[[Key], None],
        metrics: Metrics,
    ) -> None:
        self._url = url
        self._installation = installation
        self._period_s = period_s
        self._may_write = may_write
        self._is_gone = is_gone
        self._notify = notify
        self._metrics = metrics
        self._wanted: dict[Key, tuple[RedisUser, ...]] = {}
        self._changed = asyncio.Event()
        self._is_closed = False
        self._made: dict[str, dict[str, tuple[RedisUser, _Listed]]] = {}
        """By node and name, what was made and how the node lists it."""
        self._right: frozenset[RedisUser] = frozenset()
        """Those that every node had when all of them last answered."""
        self._failure: UsersProblem | None = None
        self._reasons = frozenset[str]()
        """Failures of the last comparison, as logged."""
        self.max_memory = 0
        """Bytes that Redis may use; 0 without a limit, or if it did not say so."""

    def want(self, key: Key, users: tuple[RedisUser, ...]) -> None:
        """The users of a speculator from now on. Others of its users are deleted."""
        if self._wanted.get(key) != users:
            self._wanted[key] = users
            self._changed.set()

    def forget(self, key: Key) -> None:
        """The speculator is gone."""
        if self._wanted.pop(key, ()):
            self._changed.set()

    def start_over(self) -> None:
        """Forget who wants which users. While another replica leads, nobody tells this one what has changed."""
        self._wanted.clear()
        self._right, self._failure = frozenset(), None

    def problem(self, key: Key) -> UsersProblem | None:
        """Why a user of the speculator is not known to be right; None if all are, or if nothing was tried yet."""
        return self._failure if any(user not in self._right for user in self._wanted.get(key, ())) else None

    def close(self) -> None:
        """End `run` after what it does now. Before Python 3.12, cancelling a task that sends a command may be lost."""
        self._is_closed = True
        self._changed.set()

    async def run(self) -> None:
        """Until `close`."""
        while not self._is_closed:
            self._changed.clear()
            if self._may_write():
                await self.repair()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._period_s):
                    await self._changed.wait()

    async def repair(self) -> None:
        """Compare once, and set right what differs."""
        before = {key: self.problem(key) for key in self._wanted}
        right, failures = await self._repair_nodes()
        if not self._may_write():
            return
        if any(isinstance(failure, Unavailable) for failure in failures):
            right.append(self._right)
        self._right = frozenset.intersection(*right)
        self._note(failures)
        for key, problem in before.items():
            if self.problem(key) != problem:
                self._notify(key)

    async def _repair_nodes(self) -> tuple[list[frozenset[RedisUser]], list[UpdraftError]]:
        """The users that are right on each node that answered, and what failed."""
        right, failures = list[frozenset[RedisUser]](), list[UpdraftError]()
        with _collected(right, failures):
            async with aclosing(streams.connect(self._url())) as client:
                for node, run in (await _nodes(client)).items():
                    with _collected(right, failures):
                        async with asyncio.timeout(_NODE_S):
                            right.append(await self._repair_node(node, run, failures))
                with suppress(UpdraftError):  # its user may not be allowed to ask
                    self.max_memory = await streams.max_memory(client)
        return right, failures

    async def _repair_node(self, node: str, run: Run, failures: list[UpdraftError]) -> frozenset[RedisUser]:
        listed = _listed(await run("ACL", "LIST"))
        # Without waiting from here on, because a reconciliation may want other users meanwhile.
        wanted = {user.name: user for users in self._wanted.values() for user in users}
        made = self._made.setdefault(node, {})
        settled = [user for user in wanted.values() if user.password_hash]
        wrong = [user for user in settled if not _is_right(user, made.get(user.name), listed.get(user.name))]
        stray = [name for name in listed.keys() - wanted.keys() if self._is_stray(name)]
        refused = set[RedisUser]()
        for user in wrong:
            hashes = listed[user.name].password_hashes if user.name in listed else ()
            if await self._is_done(partial(run, "ACL", "SETUSER", user.name, *user.words(hashes)), failures):
                self._metrics.redis_users.labels("set").inc()
            else:
                refused.add(user)
        if stray and await self._is_done(partial(run, "ACL", "DELUSER", *stray), failures):
            self._metrics.redis_users.labels("deleted").inc(len(stray))
        if wrong:
            listed = _listed(await run("ACL", "LIST"))
            made |= {
                user.name: (user, listed[user.name]) for user in wrong if user.name in listed and user not in refused
            }
        if wrong or stray:
            logger.info("Changed users of Redis", extra={"node": node, "set": len(wrong), "deleted": len(stray)})
        self._made[node] = {name: known for name, known in made.items() if name in wanted}
        return frozenset(wanted.values()) - refused

    async def _is_done(self, change: Run, failures: list[UpdraftError]) -> bool:
        """Run a change. If Redis refuses it, others may still succeed."""
        if not self._may_write():
            raise Unavailable("this replica does not lead any more")
        try:
            with streams.redis_errors():
                await change()
        except Unavailable:
            raise
        except UpdraftError as error:
            failures.append(error)
            return False
        return True

    def _is_stray(self, name: str) -> bool:
        owner = speculator_of(name, self._installation)
        return owner is not None and (Key(*owner) in self._wanted or self._is_gone(Key(*owner)))

    def _note(self, failures: Collection[UpdraftError]) -> None:
        """Log each failure when it begins. Only the log has Redis's answers, because they may name keys and users of others."""
        reasons = frozenset(map(str, failures))
        for reason in sorted(reasons - self._reasons):
            logger.warning("Cannot make users of Redis", extra={"reason": reason})
        self._reasons = reasons
        is_refused = not all(isinstance(failure, Unavailable) for failure in failures)
        self._failure = (_REFUSED if is_refused else _UNREACHABLE) if failures else None


@contextmanager
def _collected(right: list[frozenset[RedisUser]], failures: list[UpdraftError]) -> Iterator[None]:
    """Go on after an error. Where Redis refuses to tell about users, none is right."""
    try:
        with streams.redis_errors():
            yield
    except TimeoutError:
        failures.append(Unavailable(f"a node of Redis took more than {_NODE_S:.0f} s for its users"))
    except UpdraftError as error:
        failures.append(error)
        if not isinstance(error, Unavailable):
            right.append(frozenset())


async def _nodes(client: streams.Client) -> Mapping[str, Run]:
    """All nodes by name, replicas too: one of them may become the primary."""
    if not isinstance(client, RedisCluster):
        return {"": client.execute_command}
    await client.initialize()
    return {node.name: partial(client.execute_command, target_nodes=node) for node in client.get_nodes()}


def _listed(lines: Iterable[bytes | str]) -> dict[str, _Listed]:
    """The answer of ACL LIST by name: lines of `user NAME on #HASH ~PATTERN ... +COMMAND`."""
    found = {}
    for line in lines:
        _, name, *words = (line.decode(errors="replace") if isinstance(line, bytes) else line).split(" ")
        hashes = frozenset(word[1:] for word in words if word.startswith("#"))
        found[name] = _Listed(hashes, tuple(word for word in words if not word.startswith("#")))
    return found


def _is_right(user: RedisUser, made: tuple[RedisUser, _Listed] | None, listed: _Listed | None) -> bool:
    """Whether the node still lists what was made; a user of an earlier process is made once more."""
    if made is None or listed is None or made[0].rules != user.rules or made[1].rest != listed.rest:
        return False
    has_former = listed.password_hashes != {user.password_hash}
    return user.password_hash in listed.password_hashes and (user.keeps_former or not has_former)

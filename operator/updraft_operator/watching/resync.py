"""Periodic comparison of the cache with a full listing, to repair changes that a watch has missed.

A watch that was interrupted never reports the objects deleted meanwhile; a frozen watch reports nothing at all. Only
metadata are listed. A listing and a watch are never at the same moment, so a difference counts only if it persists;
while the watches still catch up with a listing, the resync waits for them and lists nothing again.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from updraft_chassis.clock import Clock
from updraft_chassis.errors import NotFound, Unavailable, UpdraftError
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.watching.cluster import KINDS, OURS, Cluster
from updraft_operator.watching.store import Store, is_older, key_of

logger = logging.getLogger(__name__)

GRACE_S = 3.0
"""How far a watch may lag behind a listing."""

FIRST_S = 120.0
"""The same for the first resync, counted from the last event, because the watches have to report everything then."""

_POLL_S = 1.0

Name = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Objects of a kind on which the cache and a listing disagree."""

    kind: str
    gone: frozenset[Name]
    """Cached, but not listed."""
    news: Mapping[Name, str]
    """Listed, but not cached or newer than the cached object, with the listed resource version."""

    @property
    def may_be_stale(self) -> bool:
        return bool(self.gone or self.news)

    def __and__(self, other: "Difference") -> "Difference":
        news = {name: version for name, version in self.news.items() if name in other.news}
        return Difference(kind=self.kind, gone=self.gone & other.gone, news=news)

    def still_stale(self, known: Mapping[Name, str]) -> "Difference":
        """The part of the difference that still holds for the objects cached now."""
        news = {name: version for name, version in self.news.items() if _is_newer(version, known.get(name))}
        return Difference(kind=self.kind, gone=self.gone & known.keys(), news=news)


class Resync:
    def __init__(
        self, store: Store, cluster: Cluster, clock: Clock, metrics: Metrics, namespaces: tuple[str, ...]
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._clock = clock
        self._metrics = metrics
        self._namespaces = namespaces or ("",)
        self._kinds = tuple(KINDS)
        self.synced_s: float | None = None
        """Start of the last completed resync; None before the first."""
        self.num_missed = 0
        """Consecutive resyncs that found changes which a watch had missed."""
        self._agreed_s: float | None = None
        self._began_s: float | None = None
        self._away_s: float | None = None
        """When the API server last did not answer."""

    def begin(self, kinds: Iterable[str]) -> None:
        """Start the clock of the ages; before this, it was not known which kinds are served."""
        self._kinds = tuple(kinds)
        self._began_s = self._clock.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the last completed resync, since `begin`, or since the API server last did not answer: an outage says
        nothing about this process, which would lose its cache by a restart."""
        age_s = self._seconds_since(self.synced_s)
        return age_s if self._away_s is None else min(age_s, self._seconds_since(self._away_s))

    @property
    def agreed_age_s(self) -> float:
        """Seconds since a listing last agreed with the cache, or since `begin`."""
        return self._seconds_since(self._agreed_s)

    def _seconds_since(self, at_s: float | None) -> float:
        since_s = self._began_s if at_s is None else at_s
        return 0.0 if since_s is None else self._clock.monotonic() - since_s

    async def run_once(self, add: Callable[[Key], None]) -> None:
        """List, compare and repair; calls `add` for every speculator with a missed change."""
        started_s = self._clock.monotonic()
        try:
            missed = await self._missed()
        except Unavailable:
            self._away_s = self._clock.monotonic()
            raise
        for difference in missed:
            await self._repair(difference, add)
        if missed:
            self.num_missed += 1
        else:
            self.num_missed, self._agreed_s = 0, started_s
        self.synced_s = started_s

    async def _missed(self) -> list[Difference]:
        suspects = _suspects([await self._compare(kind) for kind in self._kinds])
        until_s = self._clock.monotonic() + (FIRST_S if self.synced_s is None else GRACE_S)
        while suspects and self._clock.monotonic() < until_s:
            await asyncio.sleep(_POLL_S)
            still_stale = _suspects([suspect.still_stale(self._store.versions(suspect.kind)) for suspect in suspects])
            if still_stale == suspects:  # the cluster may have changed since the listing
                still_stale = await self._confirmed(still_stale)
            elif self.synced_s is None:
                until_s = self._clock.monotonic() + FIRST_S
            suspects = still_stale
        return await self._confirmed(suspects)

    async def _confirmed(self, suspects: list[Difference]) -> list[Difference]:
        return _suspects([suspect & await self._compare(suspect.kind) for suspect in suspects])

    async def _compare(self, kind: str) -> Difference:
        listed: dict[Name, Manifest] = {}
        for namespace in self._namespaces:
            for item in await self._cluster.metadata(kind, namespace):
                listed[item["metadata"].get("namespace", ""), item["metadata"]["name"]] = item
        known = self._store.versions(kind)
        return Difference(
            kind=kind,
            gone=frozenset(known.keys() - listed.keys()),
            news={
                name: item["metadata"]["resourceVersion"]
                for name, item in listed.items()
                if _is_news(kind, item, known.get(name))
            },
        )

    async def _repair(self, difference: Difference, add: Callable[[Key], None]) -> None:
        for namespace, name in difference.gone | difference.news.keys():
            key = self._store.owner(difference.kind, namespace, name)
            try:
                body = await self._cluster.get(difference.kind, namespace, name)
            except NotFound:
                if key is not None:
                    self._store.drop(difference.kind, key, name)
            except UpdraftError as error:
                raise Unavailable(
                    f"a watch missed a change of {difference.kind} {namespace}/{name}, which cannot be read: {error}"
                ) from error
            else:
                key = self._store.put(difference.kind, body)
            self._metrics.stale.labels(difference.kind).inc()
            change = "deleted" if (namespace, name) in difference.gone else "changed"
            logger.warning(
                "Repaired a change that a watch missed",
                extra={"kind": difference.kind, "namespace": namespace, "object": name, "change": change},
            )
            if key is not None:
                add(key)


def _is_news(kind: str, listed: Manifest, known: str | None) -> bool:
    if kind not in OURS and key_of(kind, listed) is None:
        return False
    return _is_newer(listed["metadata"]["resourceVersion"], known)


def _is_newer(version: str, known: str | None) -> bool:
    return known is None or (version != known and not is_older(version, known))


def _suspects(differences: list[Difference]) -> list[Difference]:
    return [difference for difference in differences if difference.may_be_stale]

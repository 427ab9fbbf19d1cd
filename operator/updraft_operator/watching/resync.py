"""Whether the watches told the truth: lists everything now and then, and mends what a watch has missed.

An object that was deleted while its watch was broken never shows as deleted; a watch that froze shows nothing at all.
Only metadata are listed. A listing and a watch are never at the same moment, so a difference counts only if it is
still there a little later; while the watches tell what was listed, they are waited for and nothing is listed again.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from updraft_chassis.clock import Clock
from updraft_chassis.errors import NotFound, Unavailable, UpdraftError
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.watching.cluster import KINDS, Cluster
from updraft_operator.watching.store import Store, is_older, key_of

logger = logging.getLogger(__name__)

GRACE_S = 3.0
"""What a watch may lag behind a listing."""

FIRST_S = 120.0
"""As long as that, the first time, after they told something last: they have everything to tell."""

_LOOK_S = 1.0

Name = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Objects of a kind that store and listing do not agree on."""

    kind: str
    gone: frozenset[Name]
    """Known, and not listed."""
    news: Mapping[Name, str]
    """Listed, and not known, or newer than known: with the version that was listed."""

    @property
    def is_doubtful(self) -> bool:
        """They do not agree."""
        return bool(self.gone or self.news)

    def __and__(self, other: "Difference") -> "Difference":
        news = {name: version for name, version in self.news.items() if name in other.news}
        return Difference(kind=self.kind, gone=self.gone & other.gone, news=news)

    def untold(self, known: Mapping[Name, str]) -> "Difference":
        """What of it still holds for what is known now."""
        news = {name: version for name, version in self.news.items() if _is_newer(version, known.get(name))}
        return Difference(kind=self.kind, gone=self.gone & known.keys(), news=news)


class Resync:
    """Compares, and remembers how that went."""

    def __init__(
        self, store: Store, cluster: Cluster, clock: Clock, metrics: Metrics, namespaces: tuple[str, ...]
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._clock = clock
        self._metrics = metrics
        self._namespaces = namespaces or ("",)
        self.synced_s: float | None = None
        """When everything was listed and mended last; None before the first time."""
        self.num_missed = 0
        """Listings in a row that found what a watch had missed."""
        self._agreed_s: float | None = None
        self._began_s: float | None = None

    def begin(self) -> None:
        """From now on time counts: before, the kinds were not served."""
        self._began_s = self._clock.monotonic()

    @property
    def age_s(self) -> float:
        """Since everything was listed last, or since the beginning."""
        since_s = self.synced_s if self.synced_s is not None else self._began_s
        return 0.0 if since_s is None else self._clock.monotonic() - since_s

    @property
    def agreed_age_s(self) -> float:
        """Since a listing last agreed with what the watches had said, or since the beginning."""
        since_s = self._agreed_s if self._agreed_s is not None else self._began_s
        return 0.0 if since_s is None else self._clock.monotonic() - since_s

    async def run_once(self, add: Callable[[Key], None]) -> None:
        """List, compare, and mend; `add` hears of every speculator that something was missed of."""
        started_s = self._clock.monotonic()
        missed = await self._missed()
        for each in missed:
            await self._mend(each, add)
        if missed:
            self.num_missed += 1
        else:
            self.num_missed, self._agreed_s = 0, started_s
        self.synced_s = started_s

    async def _missed(self) -> list[Difference]:
        """Differences that last."""
        doubtful = _doubtful([await self._compare(kind) for kind in KINDS])
        until_s = self._clock.monotonic() + (FIRST_S if self.synced_s is None else GRACE_S)
        while doubtful and self._clock.monotonic() < until_s:
            await asyncio.sleep(_LOOK_S)
            untold = _doubtful([each.untold(self._store.versions(each.kind)) for each in doubtful])
            if untold == doubtful:  # perhaps it is no longer so
                untold = await self._confirmed(untold)
            elif self.synced_s is None:
                until_s = self._clock.monotonic() + FIRST_S
            doubtful = untold
        return await self._confirmed(doubtful)

    async def _confirmed(self, doubtful: list[Difference]) -> list[Difference]:
        return _doubtful([each & await self._compare(each.kind) for each in doubtful])

    async def _compare(self, kind: str) -> Difference:
        listed: dict[Name, Manifest] = {}
        for namespace in self._namespaces:
            for each in await self._cluster.metadata(kind, namespace):
                listed[each["metadata"].get("namespace", ""), each["metadata"]["name"]] = each
        known = self._store.versions(kind)
        return Difference(
            kind=kind,
            gone=frozenset(known.keys() - listed.keys()),
            news={
                name: each["metadata"]["resourceVersion"]
                for name, each in listed.items()
                if _is_news(kind, each, known.get(name))
            },
        )

    async def _mend(self, found: Difference, add: Callable[[Key], None]) -> None:
        for namespace, name in found.gone | found.news.keys():
            key = self._store.owner(found.kind, namespace, name)
            try:
                body = await self._cluster.get(found.kind, namespace, name)
            except NotFound:
                if key is not None:
                    self._store.drop(found.kind, key, name)
            except UpdraftError as error:
                what = f"{found.kind} {namespace}/{name}"
                raise Unavailable(f"{what} was missed by a watch, and cannot be read: {error}") from error
            else:
                key = self._store.put(found.kind, body)
            self._metrics.stale.labels(found.kind).inc()
            what = "gone" if (namespace, name) in found.gone else "news"
            logger.warning(
                "A watch had missed a change",
                extra={"kind": found.kind, "namespace": namespace, "object": name, "what": what},
            )
            if key is not None:
                add(key)


def _is_news(kind: str, listed: Manifest, known: str | None) -> bool:
    """Whether the listing knows more."""
    if kind not in ("AdaptiveSpeculator", "DraftVersion") and key_of(kind, listed) is None:
        return False
    return _is_newer(listed["metadata"]["resourceVersion"], known)


def _is_newer(version: str, known: str | None) -> bool:
    return known is None or (version != known and not is_older(version, known))


def _doubtful(found: list[Difference]) -> list[Difference]:
    return [each for each in found if each.is_doubtful]

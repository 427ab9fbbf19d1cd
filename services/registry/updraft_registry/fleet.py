"""What the pods said last, and the streams to say something back. In memory only: pods repeat themselves.

A pod is known by its name within a speculator; its newest stream replaces an older one. A pod that has not
reported for `expiry_s` is forgotten with everything it said; until then a broken stream loses nothing.
Counters of a pod are monotonic per boot, and only those of its present boot count: whole states need no
adding up over time.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput, Unavailable, UpdraftError
from updraft_registry import wire
from updraft_registry.admission import check_name, foreign
from updraft_registry.rollout import Order, Pod
from updraft_registry.version import NO_DRAFT, Lineage

DEFAULT_EXPIRY_S = 45.0
"""Four reports of a pod that reports every ten seconds, and longer than gRPC needs to notice a dead peer."""

_MAX_VERSIONS = 64
_MAX_POSITIONS = 64
_MAX_COUNT = 2**53
_MAX_TEXT = 500


class Session:
    """One stream to a pod: the newest directive that it has not been sent yet.

    A slow reader skips what is outdated.
    """

    def __init__(self) -> None:
        self.owner: tuple[str, str] | None = None
        """Speculator and pod, from the first report on."""
        self._directive: fleet_pb2.Directive | None = None
        self.is_due = False
        """A directive waits to be sent."""
        self.is_closed = False
        self._error: UpdraftError | None = None
        self._changed = asyncio.Event()

    @property
    def nonce(self) -> str:
        """Of the directive in force; empty before the first."""
        return self._directive.nonce if self._directive else ""

    def offer(self, directive: fleet_pb2.Directive) -> None:
        """Send this, unless it is what this stream was sent last: the first one tells the pod that it is heard."""
        if directive.nonce != self.nonce:
            self._directive = directive
            self.repeat()

    def repeat(self) -> None:
        """Send the directive in force again."""
        self.is_due = True
        self._changed.set()

    def close(self, error: UpdraftError | None = None) -> None:
        """End the stream, with an error or without one."""
        self._error = self._error or error
        self.is_closed = True
        self._changed.set()

    def check(self) -> None:
        """Raise the error that the stream was ended with, if there was one."""
        if self._error is not None:
            raise self._error

    async def directives(self) -> AsyncIterator[fleet_pb2.Directive]:
        """What to send, as it comes, until the session is closed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.is_closed:
                return
            if self.is_due and self._directive is not None:
                self.is_due = False
                yield self._directive


@dataclass(slots=True)
class _Entry:
    """One pod, its last report, and its stream if it has one."""

    report: fleet_pb2.PodReport
    pod: Pod
    seen_s: float
    session: Session | None


class Fleet:
    """All pods by speculator and name. Used from the event loop only; times are monotonic seconds."""

    def __init__(self, *, expiry_s: float = DEFAULT_EXPIRY_S) -> None:
        self._expiry_s = expiry_s
        self._pods: dict[str, dict[str, _Entry]] = {}

    def report(self, session: Session, report: fleet_pb2.PodReport, now_s: float) -> bool:
        """Take a report; true if it changes what a decision reads. InvalidInput for one that cannot be."""
        _check(report)
        owner = (report.identity.speculator, report.identity.pod)
        if session.owner not in (None, owner):
            raise InvalidInput(f"this stream is of pod {session.owner}, a report on it is of {owner}")
        session.owner = owner
        pods = self._pods.setdefault(report.identity.speculator, {})
        known = pods.get(report.identity.pod)
        if known is not None and known.session is not None and known.session is not session:
            known.session.close(Unavailable("a newer stream of the same pod took over"))
        entry = _Entry(report=_slim(report), pod=_pod(report), seen_s=now_s, session=session)
        pods[report.identity.pod] = entry
        if session.nonce and report.status.nonce != session.nonce:
            session.repeat()
        return known is None or known.pod != entry.pod or known.session is not session

    def disconnect(self, session: Session) -> None:
        """Note that a stream ended; the pod stays known until it expires."""
        speculator, pod = session.owner or ("", "")
        entry = self._pods.get(speculator, {}).get(pod)
        if entry is not None and entry.session is session:
            entry.session = None

    def expire(self, now_s: float) -> frozenset[str]:
        """Forget the pods that have been silent for too long; returns the speculators they were of."""
        changed = set()
        for name, pods in self._pods.items():
            for pod, entry in list(pods.items()):
                if now_s - entry.seen_s > self._expiry_s:
                    if entry.session is not None:
                        entry.session.close(Unavailable(f"no report for {self._expiry_s:g} s"))
                    del pods[pod]
                    changed.add(name)
        self._pods = {name: pods for name, pods in self._pods.items() if pods}
        return frozenset(changed)

    def refuse_foreign(self, speculator: str, lineage: Lineage | None) -> None:
        """End the streams of pods that serve another target: no draft here is for them."""
        pods = self._pods.get(speculator, {})
        for pod, entry in list(pods.items()):
            identity = entry.report.identity
            why = lineage and foreign(
                lineage,
                target=identity.target_fingerprint,
                draft_vocabulary=identity.draft_vocabulary_fingerprint,
            )
            if why:
                if entry.session is not None:
                    entry.session.close(InvalidInput(f"pod {pod} cannot serve {speculator}: {why}"))
                del pods[pod]

    def send(self, speculator: str, orders: Mapping[str, Order]) -> None:
        """Tell the pods their orders; those that know them already hear nothing."""
        directives = {order: wire.directive(order) for order in set(orders.values())}
        for pod, entry in self._pods.get(speculator, {}).items():
            if entry.session is not None and pod in orders:
                entry.session.offer(directives[orders[pod]])

    def pods(self, speculator: str) -> tuple[Pod, ...]:
        """What decisions read, by name."""
        entries = self._pods.get(speculator, {})
        return tuple(entries[name].pod for name in sorted(entries))

    def in_use(self, speculator: str) -> frozenset[int]:
        """Versions that some pod holds, in its engine or ready."""
        reports = [entry.report for entry in self._pods.get(speculator, {}).values()]
        return frozenset(
            number for report in reports for number in (report.loaded.version, *report.prefetched_versions)
        )

    def count(self, speculator: str, serving: int) -> registry_pb2.Pods:
        """How many pods are connected, serve the stable version, or refused a version."""
        entries = [entry for entry in self._pods.get(speculator, {}).values() if entry.session is not None]
        return registry_pb2.Pods(
            connected=len(entries),
            serving_stable=sum(entry.pod.loaded == serving for entry in entries),
            failed=sum(entry.pod.refused != NO_DRAFT for entry in entries),
        )

    def traffic(self, speculator: str) -> list[registry_pb2.VersionTraffic]:
        """Counters by version, summed over the pods."""
        return wire.sum_traffic(entry.report for entry in self._pods.get(speculator, {}).values())

    def close(self) -> None:
        """End all streams: their pods come back to whoever serves next."""
        for pods in self._pods.values():
            for entry in pods.values():
                if entry.session is not None:
                    entry.session.close(Unavailable("the registry stops"))


def _pod(report: fleet_pb2.PodReport) -> Pod:
    status = report.status
    is_refusal = status.outcome == fleet_pb2.OUTCOME_NACK
    return Pod(
        name=report.identity.pod,
        loaded=report.loaded.version,
        tensors_digest=report.loaded.tensors_digest,
        refused=status.version if is_refusal else NO_DRAFT,
        refusal=status.reason[:_MAX_TEXT] if is_refusal else "",
    )


def _slim(report: fleet_pb2.PodReport) -> fleet_pb2.PodReport:
    """What is kept of a report: a thousand pods are remembered at once."""
    kept = fleet_pb2.PodReport(
        identity=report.identity,
        loaded=report.loaded,
        prefetched_versions=report.prefetched_versions,
        versions=report.versions,
    )
    for counters in kept.versions:
        counters.ClearField("inter_token_latency")
    return kept


def _check(report: fleet_pb2.PodReport) -> None:
    check_name(report.identity.speculator)
    if not 1 <= len(report.identity.pod) <= 253:
        raise InvalidInput(f"a pod's name has 1 to 253 characters, got {len(report.identity.pod)}")
    if max(len(report.versions), len(report.prefetched_versions)) > _MAX_VERSIONS:
        raise InvalidInput(f"a report on more than {_MAX_VERSIONS} versions")
    for counters in report.versions:
        if len(counters.accepted_by_position) > _MAX_POSITIONS:
            raise InvalidInput(f"a report on more than {_MAX_POSITIONS} draft positions")
        counts = (counters.verify_steps, counters.tokens, counters.proposed, *counters.accepted_by_position)
        if max(counts) > _MAX_COUNT:  # sums over pods must stay within 64 bits
            raise InvalidInput(f"a counter of version {counters.version} is {max(counts)}; the most is {_MAX_COUNT}")

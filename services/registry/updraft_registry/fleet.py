"""The last report of every pod, and the streams for directives. In memory only, because pods repeat their reports.

Pods are identified by name within a speculator, and a pod's newest stream replaces an older one. A pod that has not
reported for `expiry_s` is forgotten; until then a broken stream loses nothing. Counters of a pod are monotonic per boot,
and only the current boot counts, so nothing is accumulated over time.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from heapq import nsmallest

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.access import Caller
from updraft_chassis.errors import Forbidden, InvalidInput, NotFound, Unavailable, UpdraftError
from updraft_registry.credits import averaged, distribute
from updraft_registry.messages import wire
from updraft_registry.messages.pods import state_to_proto
from updraft_registry.messages.reports import Report, Swaps, Totals
from updraft_registry.rollout.placement import Directive, Pod
from updraft_registry.rollout.speedup import mean
from updraft_registry.rollout.version import NO_DRAFT

DEFAULT_EXPIRY_S = 45.0
"""Four report intervals, and longer than gRPC takes to detect a dead peer."""


GRANT_TOLERANCE = 0.05
"""Relative change of a grant that is not sent, so that a large fleet does not get a message for every fluctuation."""


class Session:
    """One stream to a pod, with its newest unsent directive. A slow reader skips outdated ones."""

    def __init__(self, caller: Caller | None = None) -> None:
        self._caller = caller
        """None: the registry does not check who calls."""
        self.owner: tuple[str, str] | None = None
        """Speculator and pod, set by the first report."""
        self._directive: fleet_pb2.Directive | None = None
        self.granted: float | None = None
        """Captured tokens per second that the pod was granted last; None: no grant yet."""
        self.is_due = False
        """A directive has to be sent."""
        self.is_closed = False
        self._error: UpdraftError | None = None
        self._changed = asyncio.Event()

    @property
    def nonce(self) -> str:
        """Nonce of the current directive; empty before the first."""
        return self._directive.nonce if self._directive else ""

    def admit(self, report: Report) -> None:
        """Forbidden if the token, InvalidInput if the stream belongs to another pod."""
        caller = self._caller
        if caller is not None and caller.pod not in ("", report.pod.name):
            raise Forbidden(f"the token belongs to pod {caller.pod}, but the report is from {report.pod.name}")
        if caller is not None and not caller.may_report_for(report.speculator):
            bound = " or ".join(sorted(caller.speculators))
            raise Forbidden(f"the token is for pods of {bound}, but the report is for {report.speculator}")
        if self.owner not in (None, report.owner):
            raise InvalidInput(f"this stream belongs to pod {self.owner}, but the report is from {report.owner}")
        self.owner = report.owner

    @property
    def may_hash_tenants(self) -> bool:
        """Whether directives may have the salt of the speculator; known after the first report."""
        return self._caller is None or (self.owner is not None and self._caller.may_hash_tenants_of(self.owner[0]))

    def offer(self, directive: fleet_pb2.Directive) -> None:
        """Send a directive, unless this stream was sent it last."""
        known = self._directive
        if known is None or (directive.nonce, directive.tenant_salt) != (known.nonce, known.tenant_salt):
            self._directive = directive
            self.repeat()

    def grant(self, tokens_per_s: float) -> None:
        """Send a grant with the directive, unless it is about what the pod has."""
        if self.granted is None or abs(tokens_per_s - self.granted) > GRANT_TOLERANCE * self.granted:
            self.granted = tokens_per_s
            self.repeat()

    def repeat(self) -> None:
        self.is_due = True
        self._changed.set()

    def close(self, error: UpdraftError | None = None) -> None:
        """End the stream, with an error or without one."""
        self._error = self._error or error
        self.is_closed = True
        self._changed.set()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    async def directives(self) -> AsyncIterator[fleet_pb2.Directive]:
        """Directives to send, until the session is closed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.is_closed:
                return
            if self.is_due and self._directive is not None:
                self.is_due = False
                yield self._addressed(self._directive)

    def _addressed(self, directive: fleet_pb2.Directive) -> fleet_pb2.Directive:
        """The directive, which pods share, with the grant of this one, and with the salt if this one may have it."""
        is_whole = self.may_hash_tenants or not directive.tenant_salt
        if self.granted is None and is_whole:
            return directive
        message = fleet_pb2.Directive()
        if self.granted is not None:
            message.capture.payload_tokens_per_second = self.granted
        message.MergeFrom(directive)
        if not is_whole:
            message.ClearField("tenant_salt")
        return message


@dataclass(slots=True)
class _Entry:
    """A pod, its last report, and its stream."""

    report: Report
    last_report_s: float
    session: Session | None
    traffic: float
    """Tokens per second that it might capture."""

    @property
    def pod(self) -> Pod:
        return self.report.pod if self.session is not None else replace(self.report.pod, is_connected=False)

    def close(self, error: UpdraftError) -> None:
        if self.session is not None:
            self.session.close(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEffect:
    is_change: bool
    """It changes the input of decisions. Counters alone do not."""
    swaps: Swaps
    """Swaps since the previous report; none for a new pod."""


class Fleet:
    """All pods by speculator and name. Used from the event loop only; times are monotonic seconds."""

    def __init__(self, *, expiry_s: float = DEFAULT_EXPIRY_S) -> None:
        self._expiry_s = expiry_s
        self._pods: dict[str, dict[str, _Entry]] = {}
        self._totals: dict[str, Totals] = {}

    def __len__(self) -> int:
        return sum(map(len, self._pods.values()))

    def report(self, session: Session, report: Report, now_s: float) -> ReportEffect:
        """Take a report, see `Session.admit`. Reports on a closed stream are ignored."""
        if session.is_closed:
            return ReportEffect(is_change=False, swaps=Swaps())
        session.admit(report)
        known = self._pods.get(report.speculator, {}).get(report.pod.name)
        traffic = _traffic(known, report, now_s)
        self._keep(_Entry(report=report, last_report_s=now_s, session=session, traffic=traffic), known)
        if session.nonce and report.nonce != session.nonce:
            session.repeat()
        if known is None:
            return ReportEffect(is_change=True, swaps=Swaps())
        if known.session is not session:
            known.close(Unavailable("a newer stream of the same pod took over"))
        is_same_boot = known.report.pod.boot == report.pod.boot
        return ReportEffect(
            is_change=known.report.pod != report.pod or known.session is not session,
            swaps=report.swaps.since(known.report.swaps if is_same_boot else Swaps()),
        )

    def disconnect(self, session: Session) -> None:
        """Note that a stream ended. The pod stays known until it expires."""
        speculator, pod = session.owner or ("", "")
        entry = self._pods.get(speculator, {}).get(pod)
        if entry is not None and entry.session is session:
            entry.session = None

    def expire(self, now_s: float) -> frozenset[str]:
        """Forget pods that have been silent for too long; return their speculators."""
        changed = set()
        for name, pods in list(self._pods.items()):
            silent = [pod for pod, entry in pods.items() if now_s - entry.last_report_s > self._expiry_s]
            for pod in silent:
                self._forget(pods[pod], Unavailable(f"no report for {self._expiry_s:g} s"))
                changed.add(name)
        return frozenset(changed)

    def refuse_foreign(self, speculator: str, target: str) -> None:
        """End the streams of pods that serve another target, because no draft here fits them. Empty: no target yet."""
        for entry in list(self._entries(speculator)) if target else ():
            report = entry.report
            if report.target and report.target != target:
                why = f"its target is {report.target}, but the drafts are for {target}"
                self._forget(entry, InvalidInput(f"pod {report.pod.name} cannot serve {speculator}: {why}"))

    def send(
        self,
        speculator: str,
        directives: Mapping[str, Directive],
        observed_pods: Iterable[Pod],
        *,
        tenant_salt: bytes = b"",
    ) -> None:
        """Send each pod its directive, unless it was sent last.

        A pod that restarted since it was observed gets nothing, because the directive may be what killed it.
        """
        boots = {pod.name: pod.boot for pod in observed_pods}
        messages: dict[Directive, fleet_pb2.Directive] = {}
        last, message = None, fleet_pb2.Directive()
        for pod, entry in self._pods.get(speculator, {}).items():
            directive = directives.get(pod)
            if entry.session is None or directive is None or entry.report.pod.boot != boots.get(pod):
                continue
            if directive is not last:  # most pods share one object, and hashing it is the slowest part
                last = directive
                message = messages.get(directive) or wire.directive_to_proto(directive, num_pods=len(directives))
                message.tenant_salt = tenant_salt
                messages[directive] = message
            entry.session.offer(message)

    def grant(self, speculator: str, demand: float) -> float:
        """Distribute what a trainer can use over the connected pods that are not draining; returns what they were granted."""
        entries = self._capturing(speculator)
        grants = distribute(demand, {name: entry.traffic for name, (entry, _) in entries.items()})
        for name, (_, session) in entries.items():
            session.grant(grants[name])
        return sum(grants.values())

    def granted(self, speculator: str) -> float:
        """Captured tokens per second that these pods were granted last."""
        return sum(session.granted or 0.0 for _, session in self._capturing(speculator).values())

    def _capturing(self, speculator: str) -> "dict[str, tuple[_Entry, Session]]":
        """Connected pods that are not draining."""
        return {
            name: (entry, entry.session)
            for name, entry in self._pods.get(speculator, {}).items()
            if entry.session is not None and not entry.report.pod.is_draining
        }

    def pods(self, speculator: str) -> tuple[Pod, ...]:
        """Pods as decisions see them, sorted by name."""
        entries = self._pods.get(speculator, {})
        return tuple(entries[name].pod for name in sorted(entries))

    def states(
        self, speculator: str, now_s: float, now_ms: int, *, after: str, size: int
    ) -> list[registry_pb2.PodState]:
        """The last reports of the first `size` pods whose names follow `after`, by name, without their traffic."""
        entries = self._pods.get(speculator, {})
        names = nsmallest(size, (name for name in entries if name > after))
        return [_state(entries[name], now_s, now_ms) for name in names]

    def state(self, speculator: str, pod: str, now_s: float, now_ms: int) -> registry_pb2.PodState:
        """The last report of one pod with its traffic; NotFound without one."""
        entry = self._pods.get(speculator, {}).get(pod)
        if entry is None:
            raise NotFound(
                f"{speculator} has no pod {pod}; a pod is forgotten {self._expiry_s:g} s after its last report"
            )
        state = _state(entry, now_s, now_ms)
        totals = Totals()
        totals.add(entry.report)
        state.traffic.extend(totals.traffic())
        return state

    def in_use(self, speculator: str) -> frozenset[int]:
        """Versions that some pod holds in its engine or keeps ready."""
        return frozenset(number for entry in self._entries(speculator) for number in entry.report.held)

    def connected(self, speculator: str) -> list[Pod]:
        """Pods with a stream."""
        return [entry.report.pod for entry in self._entries(speculator) if entry.session is not None]

    def count(self, speculator: str, serving: int, candidate: int = NO_DRAFT) -> registry_pb2.Pods:
        """Pods that serve the stable version or the candidate (0: none), refuse one, or need a restart for it.

        Draining pods do not count.
        """
        pods = [pod for pod in self.connected(speculator) if not pod.is_draining]
        awaited = serving or candidate
        return registry_pb2.Pods(
            connected=len(pods),
            serving_stable=sum(pod.loaded == serving for pod in pods),
            serving_candidate=sum(pod.loaded == candidate for pod in pods) if candidate else 0,
            failed=sum(pod.refused != NO_DRAFT for pod in pods),
            waiting_for_restart=sum(pod.waits_for_restart == awaited for pod in pods) if awaited else 0,
        )

    def capture_problem(self, speculator: str) -> str:
        """Why the first connected pod that cannot capture cannot; empty if all can."""
        return self._first(speculator, lambda report: report.capture_problem)

    def capture_too_small(self, speculator: str) -> str:
        """The setting that is too small for the traces of the first connected pod that drops some; empty if none is."""
        return self._first(speculator, lambda report: report.capture_too_small)

    def _first(self, speculator: str, text_of: Callable[[Report], str]) -> str:
        """The first text in a report of a connected pod that is not empty, with the pod's name."""
        for entry in self._entries(speculator):
            if entry.session is not None and (text := text_of(entry.report)):
                return f"{entry.report.pod.name}: {text}"
        return ""

    def speedup(self, speculator: str) -> registry_pb2.Speedup | None:
        """Mean speedup over the connected pods that measure it; None if none does."""
        speedup = mean([pod.speedup for pod in self.connected(speculator) if pod.speedup is not None])
        return None if speedup is None else registry_pb2.Speedup(**asdict(speedup))

    def traffic(self, speculator: str) -> list[registry_pb2.VersionTraffic]:
        """Counters by version, summed over the pods."""
        totals = self._totals.get(speculator)
        return totals.traffic() if totals else []

    def close(self) -> None:
        """End all streams. The pods reconnect to the next process."""
        for name in self._pods:
            for entry in self._entries(name):
                entry.close(Unavailable("the registry is shutting down"))

    def _entries(self, speculator: str) -> Iterator[_Entry]:
        return iter(self._pods.get(speculator, {}).values())

    def _keep(self, entry: _Entry, known: _Entry | None) -> None:
        name, report = entry.report.speculator, entry.report
        totals = self._totals.setdefault(name, Totals())
        totals.add(report)
        if known is not None:
            totals.take_out(known.report)
        self._pods.setdefault(name, {})[report.pod.name] = entry

    def _forget(self, entry: _Entry, error: UpdraftError) -> None:
        name = entry.report.speculator
        entry.close(error)
        self._totals[name].take_out(entry.report)
        del self._pods[name][entry.report.pod.name]
        if not self._pods[name]:
            del self._pods[name], self._totals[name]


def _traffic(known: _Entry | None, report: Report, now_s: float) -> float:
    """A restarted pod keeps its traffic: it counts from zero again, and will serve the same requests."""
    if known is None:
        return 0.0
    if known.report.pod.boot != report.pod.boot or report.offered_tokens < known.report.offered_tokens:
        return known.traffic
    tokens = report.offered_tokens - known.report.offered_tokens
    return averaged(known.traffic, tokens, now_s - known.last_report_s)


def _state(entry: _Entry, now_s: float, now_ms: int) -> registry_pb2.PodState:
    return state_to_proto(entry.report, entry.pod, reported_ms=now_ms - round(1000 * (now_s - entry.last_report_s)))

"""Pod reports: checked, and reduced to what the registry needs, so that it can keep a thousand of them.

A report is untrusted input, so everything that is summed or kept is bounded here. Pure.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, MutableSequence
from copy import deepcopy
from dataclasses import dataclass

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry.messages.admission import check_name
from updraft_registry.rollout.comparison import OTHER
from updraft_registry.rollout.placement import Pod
from updraft_registry.rollout.speedup import Speedup
from updraft_registry.rollout.traffic import NOTHING, Traffic
from updraft_registry.rollout.version import NO_DRAFT

MAX_REPORT_BYTES = 64 * 1024
"""A pod that served sixteen versions (the most it remembers) with eight draft tokens per step sends less than 8 KiB, and
holds two versions with domains, of less than 2 KiB each."""

MAX_SHOWN_DOMAINS = 16
"""Bounds the state that watchers get, and the labels of metrics."""

_MAX_VERSIONS = 64
_MAX_POSITIONS = 64
_MAX_BUCKETS = 256
_MAX_DOMAINS = 32
_MAX_DOMAIN_CHARS = 64
_MAX_TOKENS_PER_STEP = _MAX_POSITIONS + 1
"""Every draft token accepted, and the bonus token."""
_MAX_COUNT = 2**48
"""Sums over tens of thousands of pods stay within 64 bits."""
_TOKEN_S = (1e-9, 3600.0)
"""Plausible mean seconds between tokens. Ratios and logarithms of such values are finite."""
_MAX_TEXT = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """Draft tokens of one version, proposed and accepted, by position; monotonic per boot."""

    proposed: int
    proposed_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swaps:
    """Draft swaps of a pod, and how long decoding paused for them; monotonic per boot."""

    swapped: int = 0
    refused: int = 0
    pause_s: float = 0.0

    def since(self, earlier: "Swaps") -> "Swaps":
        """Difference to an earlier value; zero where counters were reset."""
        return Swaps(
            swapped=max(0, self.swapped - earlier.swapped),
            refused=max(0, self.refused - earlier.refused),
            pause_s=max(0.0, self.pause_s - earlier.pause_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    speculator: str
    pod: Pod
    target: str
    """Fingerprint."""
    drafted: Mapping[int, Drafted]
    swaps: Swaps
    nonce: str
    """Nonce of the directive that the pod follows."""
    sent_ms: int
    capture_problem: str = ""
    """Why the pod cannot capture; empty if it can."""
    capture_too_small: str = ""
    """The setting that is too small for its traces; empty if none is."""
    offered_tokens: int = 0
    """Tokens that the pod might have captured; monotonic per boot."""
    engine: str = ""
    device: str = ""
    """Device that the engine runs on; empty while it is not known."""
    running_requests: int = 0

    @property
    def owner(self) -> tuple[str, str]:
        return self.speculator, self.pod.name

    @property
    def held(self) -> Iterator[int]:
        """Versions in the engine or ready for it."""
        yield self.pod.loaded
        yield from self.pod.prefetched


def read(report: fleet_pb2.PodReport) -> Report:
    """Check and convert a report; InvalidInput for one that is not plausible."""
    if report.ByteSize() > MAX_REPORT_BYTES:
        raise InvalidInput(f"a report of {report.ByteSize()} bytes; at most {MAX_REPORT_BYTES}")
    identity, status, swaps = report.identity, report.status, report.swaps
    check_name(identity.speculator)
    if not 1 <= len(identity.pod) <= 253 or not identity.pod.isprintable():  # terminals show it
        raise InvalidInput(f"a pod's name has 1 to 253 printable characters, got {identity.pod[:80]!r}")
    if max(len(report.versions), len(report.prefetched_versions)) > _MAX_VERSIONS:
        raise InvalidInput(f"a report on more than {_MAX_VERSIONS} versions")
    is_refusal, is_pending = status.outcome == fleet_pb2.OUTCOME_NACK, status.outcome == fleet_pb2.OUTCOME_PENDING
    if report.capture.offered_tokens > _MAX_COUNT:
        raise InvalidInput(f"{report.capture.offered_tokens} tokens were offered for capture; at most {_MAX_COUNT}")
    return Report(
        speculator=identity.speculator,
        pod=Pod(
            name=identity.pod,
            boot=identity.boot_id,
            loaded=report.loaded.version,
            tensors_digest=report.loaded.tensors_digest,
            prefetched=frozenset(report.prefetched_versions),
            refused=status.version if is_refusal else NO_DRAFT,
            refusal=_line(status.reason) if is_refusal else "",
            is_draining=report.draining,
            trouble=_line(status.reason) if is_pending else "",
            waits_for_restart=status.version if is_pending and status.needs_restart else NO_DRAFT,
            traffic={counters.version: _traffic(counters) for counters in report.versions},
            domains={counters.version: _domains(counters) for counters in report.versions if counters.domains},
            speedup=_speedup(report.speedup) if report.HasField("speedup") else None,
        ),
        target=identity.target_fingerprint,
        drafted={counters.version: _drafted(counters) for counters in report.versions},
        swaps=Swaps(swapped=swaps.swaps, refused=swaps.failures, pause_s=swaps.pause_us_sum / 1e6),
        nonce=status.nonce,
        sent_ms=report.sent_unix_ms,
        capture_problem=_line(report.capture.problem),
        capture_too_small=_line(report.capture.too_small),
        offered_tokens=report.capture.offered_tokens,
        engine=_line(identity.engine),
        device=_line(report.device),
        running_requests=report.running_requests,
    )


def _speedup(reported: registry_pb2.Speedup) -> Speedup:
    if not all(map(math.isfinite, (reported.ratio, reported.low, reported.high))) or reported.ratio <= 0:
        raise InvalidInput(f"a speedup of {reported.ratio} ({reported.low} to {reported.high})")
    return Speedup(ratio=reported.ratio, low=reported.low, high=reported.high)


class Totals:
    """Counters by version, summed over the last report of every pod. A replaced report is subtracted."""

    def __init__(self) -> None:
        self._sums: dict[int, registry_pb2.VersionTraffic] = {}
        self._domains: dict[int, dict[str, Traffic]] = {}
        self._num_pods: Counter[int] = Counter()

    def add(self, report: Report) -> None:
        self._add(report, 1)

    def take_out(self, report: Report) -> None:
        self._add(report, -1)

    def traffic(self) -> list[registry_pb2.VersionTraffic]:
        """The sums, newest version first."""
        return [self._with_domains(sums) for _, sums in sorted(self._sums.items(), reverse=True)]

    def _with_domains(self, sums: registry_pb2.VersionTraffic) -> registry_pb2.VersionTraffic:
        message, domains = deepcopy(sums), self._domains.get(sums.version, {})
        for name, traffic in shown(domains).items():
            message.domains.add(
                domain=name,
                requests=traffic.requests,
                verify_steps=int(traffic.verify_steps),
                tokens=int(traffic.tokens),
            )
        return message

    def _add(self, report: Report, sign: int) -> None:
        for number, traffic in report.pod.traffic.items():
            sums = self._sums.setdefault(number, registry_pb2.VersionTraffic(version=number))
            drafted = report.drafted[number]
            sums.verify_steps += sign * int(traffic.verify_steps)
            sums.tokens += sign * int(traffic.tokens)
            sums.proposed += sign * drafted.proposed
            _add(sums.proposed_by_position, drafted.proposed_by_position, sign)
            _add(sums.accepted_by_position, drafted.accepted_by_position, sign)
            self._num_pods[number] += sign
            if not self._num_pods[number]:
                del self._sums[number], self._num_pods[number]
        for number, domains in report.pod.domains.items():
            self._add_domains(self._domains.setdefault(number, {}), domains, sign)
            if not self._domains[number]:
                del self._domains[number]

    @staticmethod
    def _add_domains(sums: dict[str, Traffic], domains: Mapping[str, Traffic], sign: int) -> None:
        for name, traffic in domains.items():
            before = sums.get(name, NOTHING)
            sums[name] = before + traffic if sign > 0 else before - traffic
            if sums[name] == NOTHING:
                del sums[name]


def shown(domains: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """The domains with most verify steps, first, and OTHER: all that no pod counts or that are not among these."""
    names = sorted(domains.keys() - {OTHER}, key=lambda name: (-domains[name].verify_steps, name))
    rest = sum((domains[name] for name in names[MAX_SHOWN_DOMAINS:]), domains.get(OTHER, NOTHING))
    return {name: domains[name] for name in names[:MAX_SHOWN_DOMAINS]} | ({OTHER: rest} if rest != NOTHING else {})


def _traffic(counters: fleet_pb2.VersionCounters) -> Traffic:
    latency = counters.inter_token_latency
    if len(latency.counts) > _MAX_BUCKETS:
        raise InvalidInput(f"a histogram of more than {_MAX_BUCKETS} buckets")
    latency_tokens = sum(latency.counts)
    shortest_s, longest_s = (latency_tokens * token_s for token_s in _TOKEN_S)
    if latency.sum != 0.0 and not shortest_s <= latency.sum <= longest_s:
        total = f"the latencies of {latency_tokens} tokens of version {counters.version} sum up to {latency.sum:g} s"
        raise InvalidInput(f"{total}; expected {_TOKEN_S[0]:g} to {_TOKEN_S[1]:g} s per token")
    _bound(
        counters.version,
        counters.requests_served,
        counters.verify_steps,
        counters.tokens,
        counters.errors,
        latency_tokens,
    )
    _check_tokens(counters.version, counters.tokens, counters.verify_steps)
    return Traffic(
        requests=counters.requests_served,
        verify_steps=counters.verify_steps,
        tokens=counters.tokens,
        latency_s=latency.sum,
        latency_tokens=latency_tokens,
        errors=counters.errors,
    )


def _domains(counters: fleet_pb2.VersionCounters) -> dict[str, Traffic]:
    if len(counters.domains) > _MAX_DOMAINS:
        raise InvalidInput(f"a report on more than {_MAX_DOMAINS} domains")
    return {counted.domain: _domain(counters.version, counted) for counted in counters.domains}


def _domain(version: int, counted: registry_pb2.DomainTraffic) -> Traffic:
    if not 1 <= len(counted.domain) <= _MAX_DOMAIN_CHARS or not counted.domain.isprintable():
        raise InvalidInput(
            f"a domain's name has 1 to {_MAX_DOMAIN_CHARS} printable characters, got {counted.domain[:80]!r}"
        )
    _bound(version, counted.requests, counted.verify_steps, counted.tokens)
    _check_tokens(version, counted.tokens, counted.verify_steps)
    return Traffic(requests=counted.requests, verify_steps=counted.verify_steps, tokens=counted.tokens)


def _drafted(counters: fleet_pb2.VersionCounters) -> Drafted:
    proposed, accepted = tuple(counters.proposed_by_position), tuple(counters.accepted_by_position)
    if max(len(proposed), len(accepted)) > _MAX_POSITIONS:
        raise InvalidInput(f"a report on more than {_MAX_POSITIONS} draft positions")
    _bound(counters.version, counters.proposed, *proposed, *accepted)
    return Drafted(proposed=counters.proposed, proposed_by_position=proposed, accepted_by_position=accepted)


def _line(text: str) -> str:
    """One printable line, because histories and terminals show it."""
    return "".join(char if char.isprintable() else " " for char in text[:_MAX_TEXT])


def _bound(version: int, *counts: int) -> None:
    if max(counts) > _MAX_COUNT:
        raise InvalidInput(f"a counter of version {version} is {max(counts)}; at most {_MAX_COUNT}")


def _check_tokens(version: int, tokens: int, steps: int) -> None:
    """Decisions read their quotient, so one report could make any draft look good."""
    if tokens > _MAX_TOKENS_PER_STEP * steps:
        counted = f"{tokens} tokens in {steps} verify steps of version {version}"
        raise InvalidInput(f"{counted}; a step has at most {_MAX_TOKENS_PER_STEP}")


def _add(sums: MutableSequence[int], counts: tuple[int, ...], sign: int) -> None:
    if len(counts) > len(sums):
        sums.extend([0] * (len(counts) - len(sums)))
    for position, count in enumerate(counts):
        sums[position] += sign * count

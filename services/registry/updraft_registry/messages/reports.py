"""Pod reports: checked, and reduced to what the registry needs, so that it can keep a thousand of them.

A report is untrusted input, so everything that is summed or kept is bounded here. Pure.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from copy import deepcopy
from dataclasses import dataclass

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput
from updraft_registry.messages.admission import check_name
from updraft_registry.rollout.comparison import Traffic
from updraft_registry.rollout.placement import Pod
from updraft_registry.rollout.version import NO_DRAFT

MAX_REPORT_BYTES = 64 * 1024
"""A pod that served sixteen versions (the most it remembers) with eight draft tokens per step sends less than 8 KiB."""

_MAX_VERSIONS = 64
_MAX_POSITIONS = 64
_MAX_BUCKETS = 256
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
    speedup: registry_pb2.Speedup | None = None
    offered_tokens: int = 0
    """Tokens that the pod might have captured; monotonic per boot."""

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
            traffic={counters.version: _traffic(counters) for counters in report.versions},
        ),
        target=identity.target_fingerprint,
        drafted={counters.version: _drafted(counters) for counters in report.versions},
        swaps=Swaps(swapped=swaps.swaps, refused=swaps.failures, pause_s=swaps.pause_us_sum / 1e6),
        nonce=status.nonce,
        sent_ms=report.sent_unix_ms,
        capture_problem=_line(report.capture.problem),
        speedup=_speedup(report.speedup) if report.HasField("speedup") else None,
        offered_tokens=report.capture.offered_tokens,
    )


def _speedup(reported: registry_pb2.Speedup) -> registry_pb2.Speedup:
    if not all(map(math.isfinite, (reported.ratio, reported.low, reported.high))) or reported.ratio <= 0:
        raise InvalidInput(f"a speedup of {reported.ratio} ({reported.low} to {reported.high})")
    copy = registry_pb2.Speedup()
    copy.CopyFrom(reported)  # the original keeps the whole report in memory
    return copy


def mean_speedup(speedups: Sequence[registry_pb2.Speedup]) -> registry_pb2.Speedup | None:
    """Mean over independent pods, with its interval; None without any."""
    if not speedups:
        return None
    ratio = sum(one.ratio for one in speedups) / len(speedups)
    width = math.hypot(*((one.high - one.low) / 2 for one in speedups)) / len(speedups)
    return registry_pb2.Speedup(ratio=ratio, low=ratio - width, high=ratio + width)


class Totals:
    """Counters by version, summed over the last report of every pod. A replaced report is subtracted."""

    def __init__(self) -> None:
        self._sums: dict[int, registry_pb2.VersionTraffic] = {}
        self._num_pods: Counter[int] = Counter()

    def add(self, report: Report) -> None:
        self._add(report, 1)

    def take_out(self, report: Report) -> None:
        self._add(report, -1)

    def traffic(self) -> list[registry_pb2.VersionTraffic]:
        """The sums, newest version first."""
        return [deepcopy(sums) for _, sums in sorted(self._sums.items(), reverse=True)]

    def _add(self, report: Report, sign: int) -> None:
        for number, traffic in report.pod.traffic.items():
            sums = self._sums.setdefault(number, registry_pb2.VersionTraffic(version=number))
            drafted = report.drafted[number]
            sums.verify_steps += sign * traffic.verify_steps
            sums.tokens += sign * traffic.tokens
            sums.proposed += sign * drafted.proposed
            _add(sums.proposed_by_position, drafted.proposed_by_position, sign)
            _add(sums.accepted_by_position, drafted.accepted_by_position, sign)
            self._num_pods[number] += sign
            if not self._num_pods[number]:
                del self._sums[number], self._num_pods[number]


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
    return Traffic(
        requests=counters.requests_served,
        verify_steps=counters.verify_steps,
        tokens=counters.tokens,
        latency_s=latency.sum,
        latency_tokens=latency_tokens,
        errors=counters.errors,
    )


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


def _add(sums: MutableSequence[int], counts: tuple[int, ...], sign: int) -> None:
    if len(counts) > len(sums):
        sums.extend([0] * (len(counts) - len(sums)))
    for position, count in enumerate(counts):
        sums[position] += sign * count

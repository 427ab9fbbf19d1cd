"""Totals of finished requests by draft version. Pure.

A step counts for the version that drafted it alone, also after a swap within a request. Steps of `hybrid` requests count where
they were drawn by chance, because elsewhere the draft model stands only where it was trusted, which flatters the worse draft.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from updraft.fleet.v1 import fleet_pb2
from updraft.registry.v1 import registry_pb2
from updraft_inference.agent.domains import OTHER
from updraft_inference.engine import CountedRequest, CountedSteps, Drafter, FinishedRequest, StepSums

LATENCY_BOUNDS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.12,
    0.2,
    0.4,
    0.8,
    1.6,
    5.0,
)
"""Upper bounds of the inter-token latency histogram, from the milliseconds of a GPU to the seconds of a loaded laptop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    drafter: Drafter
    draft_version: int
    verify_steps: int
    proposed: int
    accepted: int

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per verify step (1: no draft token was accepted); None without a step."""
        return 1 + self.accepted / self.verify_steps if self.verify_steps else None


def usage(finished: FinishedRequest | CountedRequest) -> Usage:
    """`drafter` is the one that proposed most tokens, `draft_version` the last one that drafted."""
    proposed_by: Counter[Drafter] = Counter()
    for sums in finished.sums:
        proposed_by[sums.drafter] += sum(sums.proposed)
    top = max(proposed_by, key=lambda drafter: proposed_by[drafter], default=Drafter.NONE)
    return Usage(
        drafter=top if proposed_by[top] else Drafter.NONE,
        draft_version=finished.last_version,
        verify_steps=sum(sums.verify_steps for sums in finished.sums),
        proposed=proposed_by.total(),
        accepted=sum(sum(sums.accepted) for sums in finished.sums),
    )


def total(usages: Sequence[Usage]) -> Usage:
    """The sum over the choices of one answer, at least one. Drafter and version are those of the choice with most proposals."""
    most = max(usages, key=lambda choice: choice.proposed)
    return Usage(
        drafter=most.drafter,
        draft_version=most.draft_version,
        verify_steps=sum(choice.verify_steps for choice in usages),
        proposed=sum(choice.proposed for choice in usages),
        accepted=sum(choice.accepted for choice in usages),
    )


@dataclass(frozen=True, slots=True)
class Latencies:
    """Tokens by bucket of LATENCY_BOUNDS_S, and above all bounds, and the seconds of all of them."""

    counts: tuple[int, ...]
    seconds: float

    @classmethod
    def of(cls, tokens: ArrayLike, seconds: ArrayLike) -> Self:
        """The tokens of a step share its seconds. `tokens`, `seconds`: [steps] or scalars.

        Steps without tokens count nothing.
        """
        tokens, seconds = np.atleast_1d(tokens), np.atleast_1d(seconds)
        buckets = np.searchsorted(LATENCY_BOUNDS_S, seconds / np.maximum(tokens, 1))
        counts = np.bincount(buckets, weights=tokens, minlength=len(LATENCY_BOUNDS_S) + 1)
        return cls(tuple(map(int, counts)), float(seconds[tokens > 0].sum()))

    @classmethod
    def of_sums(cls, sums: StepSums | CountedSteps) -> Self:
        """The tokens of steps that are known in sum count as equally fast; none counts if the duration is not known."""
        if isinstance(sums, StepSums):
            return cls.of(sums.tokens, sums.seconds)
        return cls.of(sums.tokens if sums.duration_s else 0, sums.duration_s)


def num_tokens(sums: StepSums | CountedSteps) -> int:
    return int(sums.tokens.sum()) if isinstance(sums, StepSums) else sums.tokens


Tallies = Mapping[int, fleet_pb2.VersionCounters]
"""Totals since the process started, by version, the last served one last; 0 is for steps without a draft, or mixed with n-gram
lookup."""

MAX_VERSIONS = 16
"""Keeps reports small on pods that serve thousands of versions over months."""


def folded(
    tallies: Tallies,
    finished: FinishedRequest | CountedRequest,
    *,
    domain: str = "",
    domains: Collection[str] = (),
) -> dict[int, fleet_pb2.VersionCounters]:
    """Add one request. Beyond MAX_VERSIONS, those that were not served for longest are dropped.

    A request with a domain also counts for that if it is one of `domains`, else for OTHER. Domains that are no longer among
    these are dropped.
    """
    served: dict[int, fleet_pb2.VersionCounters] = {}
    for sums in finished.sums:
        _add_steps(_served(served, tallies, _proved(sums)), sums, num_tokens(sums), Latencies.of_sums(sums))
    for version, counters in served.items():
        counters.requests_served += 1
        if domain:
            _add_to_domain(counters, tallies.get(version, _NOTHING), domain, domains)
    return _replaced(tallies, served)


def with_errors(tallies: Tallies, version: int, num: int) -> dict[int, fleet_pb2.VersionCounters]:
    served: dict[int, fleet_pb2.VersionCounters] = {}
    _served(served, tallies, version).errors += num
    return _replaced(tallies, served)


_NOTHING = fleet_pb2.VersionCounters()


def _served(served: dict[int, fleet_pb2.VersionCounters], tallies: Tallies, version: int) -> fleet_pb2.VersionCounters:
    """The new counters of a version. The old ones stay as they are, because a report may be reading them."""
    if version not in served:
        counters = fleet_pb2.VersionCounters(version=version)
        counters.inter_token_latency.bounds.extend(LATENCY_BOUNDS_S)
        counters.inter_token_latency.counts.extend([0] * (len(LATENCY_BOUNDS_S) + 1))
        if version in tallies:
            counters.CopyFrom(tallies[version])
        served[version] = counters
    return served[version]


def _add_to_domain(
    counters: fleet_pb2.VersionCounters, before: fleet_pb2.VersionCounters, domain: str, domains: Collection[str]
) -> None:
    """Add what the counters of a version grew by to one of its domains."""
    name = domain if domain in domains else OTHER
    kept = {entry.domain: entry for entry in counters.domains if entry.domain in domains or entry.domain == OTHER}
    entry = kept.setdefault(name, registry_pb2.DomainTraffic(domain=name))
    entry.requests += 1
    entry.verify_steps += counters.verify_steps - before.verify_steps
    entry.tokens += counters.tokens - before.tokens
    counters.ClearField("domains")
    counters.domains.extend(kept.values())


def _add_steps(
    counters: fleet_pb2.VersionCounters, steps: StepSums | CountedSteps, tokens: int, latencies: Latencies
) -> None:
    counters.verify_steps += steps.verify_steps
    counters.tokens += tokens
    counters.proposed += sum(steps.proposed)
    counters.proposed_by_position[:] = _sums(counters.proposed_by_position, steps.proposed)
    counters.accepted_by_position[:] = _sums(counters.accepted_by_position, steps.accepted)
    counters.inter_token_latency.counts[:] = _sums(counters.inter_token_latency.counts, latencies.counts)
    counters.inter_token_latency.sum += latencies.seconds


def _proved(steps: StepSums | CountedSteps) -> int:
    """The version that the steps are evidence about; 0 if about none."""
    return 0 if steps.drafter is Drafter.HYBRID else steps.draft_version


def _replaced(tallies: Tallies, served: Tallies) -> dict[int, fleet_pb2.VersionCounters]:
    others = {version: counters for version, counters in tallies.items() if version not in served}
    return dict([*others.items(), *served.items()][-MAX_VERSIONS:])


def _sums(counts: Iterable[int], more: Iterable[int]) -> list[int]:
    return [a + b for a, b in zip_longest(counts, more, fillvalue=0)]

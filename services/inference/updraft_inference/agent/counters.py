"""Totals of finished requests by draft version. Pure.

A step counts for the version that drafted it alone, also after a swap within a request. Steps of `hybrid` requests count where
they were drawn by chance, because elsewhere the draft model stands only where it was trusted, which flatters the worse draft.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from updraft.fleet.v1 import fleet_pb2
from updraft_inference.engine import Drafter, FinishedRequest, VerifyStep

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


def usage(finished: FinishedRequest) -> Usage:
    """`drafter` is the one that proposed most tokens, `draft_version` the last one that drafted."""
    proposed_by: Counter[Drafter] = Counter()
    for step in finished.steps:
        proposed_by[step.drafter] += len(step.draft_ids)
    rest = finished.uncaptured
    if rest is not None:
        proposed_by[rest.drafter] += sum(rest.proposed)
    top = max(proposed_by, key=lambda drafter: proposed_by[drafter], default=Drafter.NONE)
    last = next((s.draft_version for s in reversed(finished.steps) if s.draft_version), 0)
    return Usage(
        drafter=top if proposed_by[top] else Drafter.NONE,
        draft_version=last or (rest.draft_version if rest is not None else 0),
        verify_steps=len(finished.steps) + (rest.verify_steps if rest is not None else 0),
        proposed=proposed_by.total(),
        accepted=sum(step.accepted for step in finished.steps) + (sum(rest.accepted) if rest is not None else 0),
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


def emitted(finished: FinishedRequest) -> Iterator[tuple[VerifyStep, int]]:
    """Each step with the number of tokens that it added: a limit or an end token may have cut the last one."""
    for step in finished.steps:
        yield step, max(0, min(step.emitted, len(finished.output_ids) - step.start))


Tallies = Mapping[int, fleet_pb2.VersionCounters]
"""Totals since the process started, by version, the last served one last; 0 is for steps without a draft, or mixed with n-gram
lookup."""

MAX_VERSIONS = 16
"""Keeps reports small on pods that serve thousands of versions over months."""


def folded(tallies: Tallies, finished: FinishedRequest) -> dict[int, fleet_pb2.VersionCounters]:
    """Add one request. Beyond MAX_VERSIONS, those that were not served for longest are dropped."""
    result = _copied(tallies)
    served = set()
    for step, num_tokens in emitted(finished):
        proposed, accepted = (1,) * len(step.draft_ids), (1,) * step.accepted
        _add_steps(_served(result, _proved(step)), 1, num_tokens, proposed, accepted, step.duration_s)
        served.add(_proved(step))
    rest = finished.uncaptured
    if rest is not None:  # its tokens count as equally fast
        counters = _served(result, rest.draft_version)
        _add_steps(counters, rest.verify_steps, rest.tokens, rest.proposed, rest.accepted, rest.duration_s)
        served.add(rest.draft_version)
    for version in served:
        result[version].requests_served += 1
    return _newest(result)


def with_errors(tallies: Tallies, version: int, num: int) -> dict[int, fleet_pb2.VersionCounters]:
    result = _copied(tallies)
    _served(result, version).errors += num
    return _newest(result)


def _copied(tallies: Tallies) -> dict[int, fleet_pb2.VersionCounters]:
    copies = {}
    for version, counters in tallies.items():
        copies[version] = fleet_pb2.VersionCounters()
        copies[version].CopyFrom(counters)
    return copies


def _served(tallies: dict[int, fleet_pb2.VersionCounters], version: int) -> fleet_pb2.VersionCounters:
    """The counters of a version, which is now the last served one."""
    counters = tallies.pop(version, None)
    if counters is None:
        latency = fleet_pb2.Histogram(bounds=LATENCY_BOUNDS_S, counts=[0] * (len(LATENCY_BOUNDS_S) + 1))
        counters = fleet_pb2.VersionCounters(version=version, inter_token_latency=latency)
    tallies[version] = counters
    return counters


def _add_steps(
    counters: fleet_pb2.VersionCounters,
    verify_steps: int,
    tokens: int,
    proposed: Sequence[int],
    accepted: Sequence[int],
    duration_s: float,
) -> None:
    per_token_s = duration_s / max(1, tokens)
    counters.verify_steps += verify_steps
    counters.tokens += tokens
    counters.proposed += sum(proposed)
    counters.proposed_by_position[:] = _sums(counters.proposed_by_position, proposed)
    counters.accepted_by_position[:] = _sums(counters.accepted_by_position, accepted)
    counters.inter_token_latency.counts[bisect_left(LATENCY_BOUNDS_S, per_token_s)] += tokens
    counters.inter_token_latency.sum += per_token_s * tokens


def _proved(step: VerifyStep) -> int:
    """The version that the step is evidence about; 0 if about none."""
    return 0 if step.drafter is Drafter.HYBRID else step.draft_version


def _newest(tallies: Tallies) -> dict[int, fleet_pb2.VersionCounters]:
    return dict(list(tallies.items())[-MAX_VERSIONS:])


def _sums(counts: Iterable[int], more: Iterable[int]) -> list[int]:
    return [a + b for a, b in zip_longest(counts, more, fillvalue=0)]

"""Totals of finished requests by draft version. Pure.

A step counts for the version that drafted it, also after a swap within a request. Statistics per request (acceptance
length) count only requests that a single version served, because a mixed request says nothing about either version.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from updraft.fleet.v1 import fleet_pb2
from updraft_inference.engine import Drafter, FinishedRequest, UncapturedSteps, VerifyStep

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
"""Upper bounds of the inter-token latency histogram, from the milliseconds of a GPU to the seconds of a loaded laptop.
"""


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
    """The sum over the choices of one answer, at least one. Drafter and version are those of the choice with most
    proposals."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTally:
    """Totals of one version since the process started; see updraft.fleet.v1.VersionCounters."""

    requests: int = 0
    """Requests that only this version served."""
    requests_served: int = 0
    """Requests with at least one verify step of this version."""
    errors: int = 0
    verify_steps: int = 0
    tokens: int = 0
    proposed: tuple[int, ...] = ()
    """By position in the draft."""
    accepted: tuple[int, ...] = ()
    latency_counts: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS_S) + 1)
    latency_sum_s: float = 0.0
    acceptance_length_sum: float = 0.0
    acceptance_length_square_sum: float = 0.0

    def with_step(self, step: VerifyStep, num_tokens: int) -> "VersionTally":
        """Add one step that gave `num_tokens` tokens."""
        proposed, accepted = (1,) * len(step.draft_ids), (1,) * step.accepted
        return self._plus(1, num_tokens, proposed, accepted, step.duration_s)

    def with_totals(self, totals: UncapturedSteps) -> "VersionTally":
        """Add steps of which only totals are known. Their tokens count as equally fast."""
        return self._plus(totals.verify_steps, totals.tokens, totals.proposed, totals.accepted, totals.duration_s)

    def _plus(
        self, verify_steps: int, tokens: int, proposed: Sequence[int], accepted: Sequence[int], duration_s: float
    ) -> "VersionTally":
        per_token_s = duration_s / max(1, tokens)
        bucket = bisect_left(LATENCY_BOUNDS_S, per_token_s)
        return replace(
            self,
            verify_steps=self.verify_steps + verify_steps,
            tokens=self.tokens + tokens,
            proposed=_sums(self.proposed, proposed),
            accepted=_sums(self.accepted, accepted),
            latency_counts=_sums(self.latency_counts, (*(0,) * bucket, tokens)),
            latency_sum_s=self.latency_sum_s + per_token_s * tokens,
        )

    def with_request(self, acceptance_length: float) -> "VersionTally":
        """Add one request that only this version served."""
        return replace(
            self,
            requests=self.requests + 1,
            acceptance_length_sum=self.acceptance_length_sum + acceptance_length,
            acceptance_length_square_sum=self.acceptance_length_square_sum + acceptance_length**2,
        )

    def counters(self, version: int) -> fleet_pb2.VersionCounters:
        return fleet_pb2.VersionCounters(
            version=version,
            requests=self.requests,
            requests_served=self.requests_served,
            errors=self.errors,
            verify_steps=self.verify_steps,
            tokens=self.tokens,
            proposed=sum(self.proposed),
            proposed_by_position=self.proposed,
            accepted_by_position=self.accepted,
            inter_token_latency=fleet_pb2.Histogram(
                bounds=LATENCY_BOUNDS_S, counts=self.latency_counts, sum=self.latency_sum_s
            ),
            acceptance_length_sum=self.acceptance_length_sum,
            acceptance_length_square_sum=self.acceptance_length_square_sum,
        )


Tallies = Mapping[int, VersionTally]
"""By version, the last served one last; 0 is for steps without a draft."""

MAX_VERSIONS = 16
"""Keeps reports small on pods that serve thousands of versions over months."""


def folded(tallies: Tallies, finished: FinishedRequest) -> dict[int, VersionTally]:
    """Add one request. Beyond MAX_VERSIONS, those that were not served for longest are dropped."""
    result = dict(tallies)
    for step, num_tokens in emitted(finished):
        tally = result.pop(step.draft_version, VersionTally())
        result[step.draft_version] = tally.with_step(step, num_tokens)
    rest = finished.uncaptured
    if rest is not None:
        result[rest.draft_version] = result.pop(rest.draft_version, VersionTally()).with_totals(rest)
    served = {step.draft_version for step in finished.steps} | ({rest.draft_version} if rest is not None else set())
    for version in served:
        result[version] = replace(result[version], requests_served=result[version].requests_served + 1)
    sole = sole_version(finished)
    acceptance_length = usage(finished).acceptance_length
    if sole is not None and acceptance_length is not None:
        result[sole] = result[sole].with_request(acceptance_length)
    return _newest(result)


def with_errors(tallies: Tallies, version: int, num: int) -> dict[int, VersionTally]:
    result = dict(tallies)
    tally = result.pop(version, VersionTally())
    result[version] = replace(tally, errors=tally.errors + num)
    return _newest(result)


def sole_version(finished: FinishedRequest) -> int | None:
    """The version that made all proposals of a request (0: none); None if there were several."""
    versions = {step.draft_version for step in finished.steps if step.draft_ids}
    if finished.uncaptured is not None and any(finished.uncaptured.proposed):
        versions.add(finished.uncaptured.draft_version)
    versions = versions or {0}
    return versions.pop() if len(versions) == 1 else None


def _newest(tallies: Tallies) -> dict[int, VersionTally]:
    return dict(list(tallies.items())[-MAX_VERSIONS:])


def _sums(counts: Sequence[int], more: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(counts, more, fillvalue=0))

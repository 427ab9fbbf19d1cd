"""What ended requests add up to, by the draft version that served them. Pure.

Steps count for the version that drafted them, also when a swap came in mid-request. Statistics with the
request as the unit (acceptance length) count only requests that one version served alone: a mixed one says
nothing about either.
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
"""Upper bounds of the inter-token latency histogram: a GPU's milliseconds to a loaded laptop's seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How one request was served."""

    drafter: Drafter
    draft_version: int
    verify_steps: int
    proposed: int
    accepted: int

    @property
    def acceptance_length(self) -> float | None:
        """Tokens a verify step (1 = no draft helped): mean of accepted + 1; None without a step."""
        return 1 + self.accepted / self.verify_steps if self.verify_steps else None


def usage(finished: FinishedRequest) -> Usage:
    """`drafter` is who proposed most tokens, `draft_version` the last one that drafted."""
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
    """Of the choices of one answer, at least one; who drafted is said of the one with most proposals."""
    most = max(usages, key=lambda one: one.proposed)
    return Usage(
        drafter=most.drafter,
        draft_version=most.draft_version,
        verify_steps=sum(one.verify_steps for one in usages),
        proposed=sum(one.proposed for one in usages),
        accepted=sum(one.accepted for one in usages),
    )


def emitted(finished: FinishedRequest) -> Iterator[tuple[VerifyStep, int]]:
    """Each step with the tokens that it really gave: a limit or an end token may have cut the last one."""
    for step in finished.steps:
        yield step, max(0, min(step.emitted, len(finished.output_ids) - step.start))


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTally:
    """Sums of one version since the process started; see updraft.fleet.v1.VersionCounters."""

    requests: int = 0
    """Served by this version alone."""
    requests_served: int = 0
    """With a verify step of this version, alone or not."""
    errors: int = 0
    verify_steps: int = 0
    tokens: int = 0
    proposed: tuple[int, ...] = ()
    """By position in the chain."""
    accepted: tuple[int, ...] = ()
    latency_counts: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS_S) + 1)
    latency_sum_s: float = 0.0
    acceptance_length_sum: float = 0.0
    acceptance_length_square_sum: float = 0.0

    def with_step(self, step: VerifyStep, num_tokens: int) -> "VersionTally":
        """Plus one step that gave `num_tokens` tokens."""
        per_token_s = step.duration_s / max(1, num_tokens)
        bucket = bisect_left(LATENCY_BOUNDS_S, per_token_s)
        return replace(
            self,
            verify_steps=self.verify_steps + 1,
            tokens=self.tokens + num_tokens,
            proposed=_plus_ones(self.proposed, len(step.draft_ids)),
            accepted=_plus_ones(self.accepted, step.accepted),
            latency_counts=_plus(self.latency_counts, bucket, num_tokens),
            latency_sum_s=self.latency_sum_s + per_token_s * num_tokens,
        )

    def with_sums(self, sums: UncapturedSteps) -> "VersionTally":
        """Plus steps that are known by their sums; their tokens took equally long."""
        per_token_s = sums.duration_s / max(1, sums.tokens)
        bucket = bisect_left(LATENCY_BOUNDS_S, per_token_s)
        return replace(
            self,
            verify_steps=self.verify_steps + sums.verify_steps,
            tokens=self.tokens + sums.tokens,
            proposed=_sums(self.proposed, sums.proposed),
            accepted=_sums(self.accepted, sums.accepted),
            latency_counts=_plus(self.latency_counts, bucket, sums.tokens),
            latency_sum_s=self.latency_sum_s + sums.duration_s,
        )

    def with_request(self, acceptance_length: float) -> "VersionTally":
        """Plus one request that this version served alone."""
        return replace(
            self,
            requests=self.requests + 1,
            acceptance_length_sum=self.acceptance_length_sum + acceptance_length,
            acceptance_length_square_sum=self.acceptance_length_square_sum + acceptance_length**2,
        )

    def counters(self, version: int) -> fleet_pb2.VersionCounters:
        """As the fleet protocol carries it."""
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
"""By version, the last served last; 0 holds what was served without one."""

MAX_VERSIONS = 16
"""A pod that runs for months serves thousands; a report must stay small."""


def folded(tallies: Tallies, finished: FinishedRequest) -> dict[int, VersionTally]:
    """The tallies with one more request; beyond MAX_VERSIONS, the longest unserved are forgotten."""
    result = dict(tallies)
    for step, num_tokens in emitted(finished):
        tally = result.pop(step.draft_version, VersionTally())
        result[step.draft_version] = tally.with_step(step, num_tokens)
    rest = finished.uncaptured
    if rest is not None:
        result[rest.draft_version] = result.pop(rest.draft_version, VersionTally()).with_sums(rest)
    served = {step.draft_version for step in finished.steps} | ({rest.draft_version} if rest is not None else set())
    for number in served:
        result[number] = replace(result[number], requests_served=result[number].requests_served + 1)
    version = sole_version(finished)
    acceptance_length = usage(finished).acceptance_length
    if version is not None and acceptance_length is not None:
        result[version] = result[version].with_request(acceptance_length)
    return _newest(result)


def with_errors(tallies: Tallies, version: int, num: int) -> dict[int, VersionTally]:
    """The tallies with `num` more faults of the engine during steps of `version`."""
    result = dict(tallies)
    tally = result.pop(version, VersionTally())
    result[version] = replace(tally, errors=tally.errors + num)
    return _newest(result)


def sole_version(finished: FinishedRequest) -> int | None:
    """The version behind all proposals of a request (0: none); None if there were several."""
    versions = {step.draft_version for step in finished.steps if step.draft_ids}
    if finished.uncaptured is not None and any(finished.uncaptured.proposed):
        versions.add(finished.uncaptured.draft_version)
    versions = versions or {0}
    return versions.pop() if len(versions) == 1 else None


def _newest(tallies: Tallies) -> dict[int, VersionTally]:
    return dict(list(tallies.items())[-MAX_VERSIONS:])


def _plus_ones(counts: tuple[int, ...], num: int) -> tuple[int, ...]:
    """One more in each of the first `num` positions."""
    longer = counts + (0,) * (num - len(counts))
    return tuple(count + (position < num) for position, count in enumerate(longer))


def _sums(counts: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(one + other for one, other in zip_longest(counts, more, fillvalue=0))


def _plus(counts: tuple[int, ...], position: int, num: int) -> tuple[int, ...]:
    return (*counts[:position], counts[position] + num, *counts[position + 1 :])

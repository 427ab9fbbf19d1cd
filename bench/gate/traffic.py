"""Simulated traffic of a fleet, request by request, with a known truth about two drafts.

Requests come in bursts (Pareto gaps of infinite variance) and have lognormal lengths. The acceptance length of each is drawn
once, and a candidate multiplies it. A request counts when it ends, for the versions that its pod served meanwhile, as in the
engine. Time advances by reports of ten seconds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

REPORT_S = 10.0
BLOCK_S = 60.0
GAP_SHAPE = 1.5
"""Pareto tail of the gaps between requests; below 2 their variance is infinite."""
LENGTH_SIGMA = 1.0
MAX_TOKENS = 16384
STEP_S = 0.03
STEP_SIGMA = 0.1
MOST_ACCEPTED = 3.0
"""Lookahead: acceptance lengths are between 1 and 4."""
ACCEPTED = (3.7, 4.2)
"""Beta distribution of a request's share of accepted draft tokens: mean 0.47, acceptance length 2.4 on average."""
SHIFTED = (2.0, 5.5)
"""The same after a shift of the traffic: acceptance length 1.8."""
STEP_NOISE = 0.42
"""Standard deviation of a request's number of steps, divided by the square root of that number; the same for the tokens of
some of its steps, divided by its acceptance length."""

DOMAIN_LENGTHS = (0.8, 1.2)
"""Domains differ: in the first one acceptance lengths are multiplied by this, in the last one by that, evenly in between."""

COLUMNS = ("requests", "verify_steps", "tokens", "latency_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The true properties of a simulated fleet."""

    pods: int
    effect: float
    """Relative acceptance length of the candidate: 0.1 is ten percent above the stable version."""
    requests_per_s: float = 2.0
    """Per pod."""
    median_tokens: int = 128
    """Length of an output; the mean is 1.6 times as long."""
    slowdown: float = 0.0
    """Relative duration of the candidate's verify steps: 0.1 is ten percent slower."""
    pod_sigma: float = 0.0
    """Lasting differences of acceptance between pods, as with sticky sessions: sigma of the logarithm."""
    share_alone: float = 1.0
    """Share of verify steps that count, drawn by chance; the others are mixed with n-gram lookup."""
    shift_s: float = float("inf")
    """When the traffic changes for all pods."""
    domains: int = 0
    """Equally large kinds of traffic that callers name."""
    effect_in_one: float = 0.0
    """The candidate's effect in the first domain; `effect` is that in the others."""


class SimulatedFleet:
    """The pods' counters, report by report: `totals[version, column, pod]`, where version 0 is stable and 1 the candidate."""

    def __init__(self, truth: Truth, rng: np.random.Generator) -> None:
        self.truth = truth
        self._rng = rng
        self._pod_factor = np.exp(rng.normal(0.0, truth.pod_sigma, truth.pods))
        self._running = np.zeros((7, 0))
        """Rows: pod, start, end (seconds, as the stable version would serve it), tokens, acceptance length, step, domain."""
        self._last_s = np.zeros(truth.pods)
        self._candidate_s = np.zeros((1, truth.pods))
        """Seconds that each pod has served the candidate, at each report so far."""
        self.totals = np.zeros((2, len(COLUMNS), truth.pods))
        self.by_domain = np.zeros((truth.domains, *self.totals.shape))
        """The same for each domain."""

    @property
    def now_s(self) -> float:
        """Time of the last report."""
        return REPORT_S * (len(self._candidate_s) - 1)

    def serve(self, is_candidate: NDArray[np.bool_]) -> None:
        """Serve until the next report, with one version per pod."""
        self._candidate_s = np.vstack((self._candidate_s, self._candidate_s[-1] + REPORT_S * is_candidate))
        while float(self._last_s.min()) < self.now_s:
            self._running = np.hstack((self._running, self._arrivals()))
        is_ended = self._running[2] <= self.now_s
        self._count(self._running[:, is_ended])
        self._running = self._running[:, ~is_ended]

    def _arrivals(self) -> Floats:
        """The next requests of every pod, for about a minute."""
        rate, rng, num_pods = self.truth.requests_per_s, self._rng, self.truth.pods
        smallest = (GAP_SHAPE - 1.0) / GAP_SHAPE / rate
        gaps = smallest * (1.0 + rng.pareto(GAP_SHAPE, (int(60 * rate), num_pods)))
        starts = self._last_s + np.cumsum(gaps, axis=0)
        self._last_s = starts[-1]
        pod, start = np.broadcast_to(np.arange(num_pods), starts.shape).ravel(), starts.ravel()
        tokens = np.clip(self.truth.median_tokens * rng.lognormal(0.0, LENGTH_SIGMA, len(start)), 1, MAX_TOKENS).round()
        a, b = np.where((start < self.truth.shift_s)[:, None], ACCEPTED, SHIFTED).T
        length = (1.0 + MOST_ACCEPTED * rng.beta(a, b)) * self._pod_factor[pod]
        step_s = STEP_S * rng.lognormal(0.0, STEP_SIGMA, len(start))
        domain = np.zeros(len(start))
        if self.truth.domains:
            domain = rng.integers(self.truth.domains, size=len(start)).astype(np.float64)
            length = np.clip(
                length * np.linspace(*DOMAIN_LENGTHS, self.truth.domains)[domain.astype(np.int64)], 1.0, None
            )
        return np.stack((pod, start, start + tokens * step_s / length, tokens, length, step_s, domain))

    def _count(self, ended: Floats) -> None:
        pods, start, end, tokens, length, step_s, domains = ended
        pod, domain = pods.astype(np.int64), domains.astype(np.int64)
        served_s = self._candidate_until(pod, end) - self._candidate_until(pod, start)
        share = np.clip(served_s / (end - start), 0.0, 1.0).round(6)
        truth, size = self.truth, len(pod)
        is_odd = (domain == 0) & (truth.domains > 0)
        effect = np.where(is_odd, truth.effect_in_one, truth.effect)
        nothing = np.zeros(size)
        for version, part, better, slower in ((0, 1.0 - share, nothing, 0.0), (1, share, effect, truth.slowdown)):
            accepted, tokens_of_part = np.maximum(length * (1.0 + better), 1.0), tokens * part
            steps = tokens_of_part / accepted
            steps = np.maximum(steps + STEP_NOISE * np.sqrt(steps) * self._rng.standard_normal(size), part)
            if truth.share_alone < 1.0:
                steps, tokens_of_part = self._drawn(steps, accepted)
            for column, values in enumerate((steps > 0.0, steps, tokens_of_part, steps * step_s * (1.0 + slower))):
                self.totals[version, column] += np.bincount(pod, values, truth.pods)
                if truth.domains:
                    counts = np.bincount(domain * truth.pods + pod, values, truth.domains * truth.pods)
                    self.by_domain[:, version, column] += counts.reshape(truth.domains, truth.pods)

    def _drawn(self, steps: Floats, accepted: Floats) -> tuple[Floats, Floats]:
        """The steps of each request that are drawn, and the tokens of those. Both are 0 for a request that has none."""
        drawn = self._rng.binomial(np.rint(steps).astype(np.int64), self.truth.share_alone).astype(np.float64)
        return drawn, accepted * (drawn + STEP_NOISE * np.sqrt(drawn) * self._rng.standard_normal(len(drawn)))

    def _candidate_until(self, pod: NDArray[np.int64], at_s: Floats) -> Floats:
        """Seconds that each pod had served the candidate at each time, up to now."""
        report = np.minimum((at_s / REPORT_S).astype(np.int64), len(self._candidate_s) - 2)
        before: Floats = self._candidate_s[report, pod]
        after: Floats = self._candidate_s[report + 1, pod]
        return before + (after - before) * (at_s / REPORT_S - report)

"""Decides with what probability payloads are captured, so that a pod captures as many tokens per second as it was granted.

Capture is chosen before a request runs, so its size is not known: its mean is charged at admission, the rest at the end.
Rejected: admit while a budget lasts. It takes all of the first requests after each refill and none of the others, and the
trainer would not know how likely a request was. Pure: times are monotonic seconds.
"""

from dataclasses import dataclass

BURST_S = 60.0
"""Seconds of the grant that a pod without traffic saves up."""

HELD_OUT_PREFERENCE = 4.0
"""A held-out request is captured so many times as likely as others: evidence needs every kind of traffic, and only a tenth of
the requests is held out."""

MAX_BIAS = 2.0
"""A domain is captured at most so many times as likely as the mean, and at least one in so many."""

MAX_DOMAINS = 64
"""Clients choose the names of domains."""

_HORIZON = 32
"""Requests after which an older one counts little in a mean."""


@dataclass(frozen=True, slots=True)
class Chance:
    """Probabilities of capture, which may exceed 1. `held_out` depends on the load only, so that evidence is unbiased."""

    payload: float = 1.0
    held_out: float = 1.0


CERTAIN = Chance()


class TokenBucket:
    """Fills by the grant and empties by what is captured. Its level, between 0 and 1, is the probability of capture.

    With twice as much traffic as granted, the level settles where half of the traffic is captured, so the traffic need not be
    measured. After large requests the level may be below 0; nothing is captured until that is paid back.
    """

    def __init__(self) -> None:
        self.rate: float | None = None
        """Granted tokens per second; None: no limit."""
        self._tokens = 0.0
        self._at_s = 0.0

    def grant(self, rate: float, now_s: float) -> None:
        """Set the rate. A full bucket stays full, and a debt stays a debt."""
        level = max(0.0, self.level(now_s))
        debt = min(0.0, self._tokens)
        self.rate = rate
        self._tokens = debt or level * self._capacity
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """Share of the capacity, at most 1; 1 without a limit, and negative in debt."""
        if self.rate is None:
            return 1.0
        self._tokens = min(self._capacity, self._tokens + self.rate * max(0.0, now_s - self._at_s))
        self._at_s = now_s
        return self._tokens / self._capacity if self._capacity else 0.0

    def charge(self, tokens: float) -> None:
        """Take tokens, or give back a negative number of them."""
        self._tokens -= tokens

    @property
    def _capacity(self) -> float:
        return BURST_S * (self.rate or 0.0)


@dataclass(frozen=True, slots=True)
class _Drafts:
    """Draft tokens of recent requests."""

    proposed: float = 0.0
    rejected: float = 0.0

    def after(self, proposed: float, rejected: float) -> "_Drafts":
        keep = 1.0 - 1.0 / _HORIZON
        return _Drafts(keep * self.proposed + proposed, keep * self.rejected + rejected)

    @property
    def rate(self) -> float:
        return self.rejected / self.proposed if self.proposed else 0.0


class RejectionBias:
    """How much likelier a domain is captured, from how many of its draft tokens were rejected lately.

    The draft has most to learn there. Requests without a domain are one domain of their own.
    """

    def __init__(self) -> None:
        self._all = _Drafts()
        self._domains: dict[str, _Drafts] = {}

    def observe(self, domain: str, *, proposed: int, accepted: int) -> None:
        if not proposed:
            return
        self._all = self._all.after(proposed, proposed - accepted)
        drafts = self._domains.pop(domain, _Drafts())  # the most recent domain is the last
        self._domains[domain] = drafts.after(proposed, proposed - accepted)
        if len(self._domains) > MAX_DOMAINS:
            del self._domains[next(iter(self._domains))]

    def factor(self, domain: str) -> float:
        """1 for a domain that nothing is known of, and while no draft token was rejected."""
        drafts = self._domains.get(domain)
        if drafts is None or not self._all.rate:
            return 1.0
        return min(MAX_BIAS, max(1.0 / MAX_BIAS, drafts.rate / self._all.rate))


class Credits:
    """How likely a pod captures a request of a domain now."""

    def __init__(self) -> None:
        self._bucket = TokenBucket()
        self._bias = RejectionBias()
        self._mean_tokens = 0.0

    def grant(self, tokens_per_s: float, now_s: float) -> None:
        self._bucket.grant(tokens_per_s, now_s)

    def chance(self, domain: str, now_s: float) -> Chance:
        if self._bucket.rate is None:
            return CERTAIN
        level = max(0.0, self._bucket.level(now_s))
        return Chance(payload=level * self._bias.factor(domain), held_out=level * HELD_OUT_PREFERENCE)

    def share(self, now_s: float) -> float:
        """Share of all traffic that may be captured now, at most 1."""
        return max(0.0, self._bucket.level(now_s))

    def reserve(self) -> float:
        """Charge a payload of the mean size; returns its tokens."""
        self._bucket.charge(self._mean_tokens)
        return self._mean_tokens

    def settle(self, reserved: float, captured: int) -> None:
        """Charge the rest of a payload that was reserved, now that its size is known."""
        self._bucket.charge(captured - reserved)

    def observe(self, domain: str, *, offered: int, proposed: int, accepted: int) -> None:
        """Learn from a finished request, captured or not; `offered` are the tokens that its payload has or would have had."""
        self._mean_tokens += (offered - self._mean_tokens) / _HORIZON if self._mean_tokens else offered
        self._bias.observe(domain, proposed=proposed, accepted=accepted)

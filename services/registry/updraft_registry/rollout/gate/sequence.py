"""Bounds on a mean that hold at every look at once, however often one looks: a confidence sequence.

Observations x_1, x_2, ... are independent and normal, with a variance that nobody knows. The Bayes factor of
"the mean is m + delta * sigma with delta ~ N(0, G)" against "the mean is m", with the right Haar prior 1/sigma
in both, depends on the data through Student's t only, and under m it is a martingale that starts at 1,
whatever sigma (Hendriksen, de Heide, Grunwald 2021; Wang, Ramdas 2023, Gaussian mixture). So it ever reaches
1/alpha with probability at most alpha (Ville 1939), and the means m for which it has not are a confidence
sequence. Refused: Lai's flat mixture (1976), which is no martingale that starts at 1 and is wider early on.
"""

import math
from dataclasses import dataclass
from typing import Self

G = 2.0
"""Variance of the prior on the effect, in units of the noise of one observation. Any value is valid; this one gives
a bound from the fourth observation on, and is within 8 % of the narrowest from the 5th to the 30th."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Number of observations, their mean, and the sum of their squared distances from it (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def plus(self, observation: float) -> Self:
        """With one observation more."""
        count = self.count + 1
        distance = observation - self.mean
        mean = self.mean + distance / count
        return type(self)(count=count, mean=mean, squares=self.squares + distance * (observation - mean))


def lower(moments: Moments, alpha: float) -> float:
    """A bound that the true mean is ever below, at this or any other look, with probability at most `alpha`."""
    return moments.mean - margin(moments, alpha)


def upper(moments: Moments, alpha: float) -> float:
    """A bound that the true mean is ever above, at this or any other look, with probability at most `alpha`."""
    return moments.mean + margin(moments, alpha)


def margin(moments: Moments, alpha: float) -> float:
    """Distance of either bound from the mean; infinite while there is none.

    Half of the prior lies on either side, BF = (BF+ + BF-) / 2, and BF- < 1 where t > 0. So BF >= (1 + 1/alpha) / 2
    implies BF+ >= 1/alpha: a one-sided bound needs only half the evidence of an interval. With v = n - 1,
        BF(t) = (1 + n G)^(-1/2) * ((1 + t^2 / v) / (1 + t^2 / (v (1 + n G))))^(n/2),
    which is solved for t in closed form.
    """
    n = moments.count
    if n < 2:
        return math.inf
    spread = 1.0 + n * G
    evidence = (1.0 + 1.0 / alpha) / 2.0
    ratio = math.exp(2.0 / n * (0.5 * math.log(spread) + math.log(evidence)))
    if ratio >= spread:  # no t is large enough
        return math.inf
    t_squared_by_v = (ratio - 1.0) / (1.0 - ratio / spread)
    return math.sqrt(t_squared_by_v * moments.squares / n)

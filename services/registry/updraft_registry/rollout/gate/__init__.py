"""Is a candidate better? `offline` asks the held-out requests in its manifest, once; `live` asks the traffic,
as often as it likes, with the confidence sequence of `sequence`. Either way there are three answers.
"""

from enum import StrEnum


class Verdict(StrEnum):
    """What the evidence says; HOLD is that it does not say."""

    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"
    HOLD = "hold"

"""Whether a candidate is better: `offline` decides once on the held-out requests of its manifest, `live` at any time on
traffic, with the confidence sequence of `sequence`. Both give one of three verdicts.
"""

from enum import StrEnum


class Verdict(StrEnum):
    """Result of a gate. HOLD: the evidence is not sufficient."""

    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"
    HOLD = "hold"

"""Which requests give rows, decided inside the engine by a policy that the agent sends. Pure.

Every process of an engine decides by the request's id alone, so they agree without talking to each other.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from updraft_tap.capture_options import CaptureOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`payload` is the fraction of requests that give rows, 0 to 1; the others are only counted. By default none does."""

    payload: float = 0.0
    prompt_rows: int = 0
    counterfactual_rows: int = 0

    def options(self, rid: str) -> CaptureOptions | None:
        """The capture options of a request; None for its counters alone."""
        if not self.payload or _fraction(rid) >= self.payload:
            return None
        return CaptureOptions(
            payload=True,
            prompt_rows=self.prompt_rows,
            counterfactual_rows=self.counterfactual_rows,
            probability=self.payload,
        )


def read_policy(header: Mapping[str, Any]) -> Policy:
    """The policy of a `policy` message. Raises ValueError."""
    payload: Any = header.get("payload")
    prompt_rows: Any = header.get("prompt_rows")
    counterfactual_rows: Any = header.get("counterfactual_rows")
    if type(payload) not in (int, float) or not 0 <= payload <= 1:
        raise ValueError(f"payload is {payload!r}, but must be a number from 0 to 1")
    for name, rows in (("prompt_rows", prompt_rows), ("counterfactual_rows", counterfactual_rows)):
        if type(rows) is not int or rows < 0:
            raise ValueError(f"{name} is {rows!r}, but must be a whole number that is not negative")
    return Policy(payload=float(payload), prompt_rows=prompt_rows, counterfactual_rows=counterfactual_rows)


def _fraction(rid: str) -> float:
    """Even over ids, from 0 up to 1."""
    return int.from_bytes(hashlib.blake2b(rid.encode(), digest_size=8).digest()) / 2**64

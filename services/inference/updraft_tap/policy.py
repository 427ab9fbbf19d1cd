"""Which requests give rows, decided inside the engine by a policy that the agent sends. Pure.

Every process of an engine decides by the request's id alone, so they agree without talking to each other.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from updraft_tap.http.terms import Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """The parts of one request to capture, besides the light record of its steps.

    `payload` requests rows of the last `prompt_rows` prompt positions and of all output positions, and up to
    `counterfactual_rows` rows after a rejection in each step. `probability`: that with which a policy chose the request.
    """

    payload: bool = False
    prompt_rows: int = 0
    counterfactual_rows: int = 0
    probability: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedRequests:
    """The captured requests of a batch, in batch order: `places` in the batch, ids, options."""

    batch_size: int
    places: tuple[int, ...]
    rids: tuple[str, ...]
    options: tuple[CaptureOptions, ...]

    @property
    def payload(self) -> tuple[int, ...]:
        """Indices into `places` of the requests that give rows."""
        return tuple(i for i, options in enumerate(self.options) if options.payload)


def captured_requests(batch: Sequence[tuple[str, CaptureOptions | None]]) -> CapturedRequests | None:
    """The requests with options, from the id and the options of every request of the batch; None if there are none."""
    captured = [(place, rid, options) for place, (rid, options) in enumerate(batch) if options is not None]
    if not captured:
        return None
    return CapturedRequests(
        batch_size=len(batch),
        places=tuple(place for place, _, _ in captured),
        rids=tuple(rid for _, rid, _ in captured),
        options=tuple(options for _, _, options in captured),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`payload` is the fraction of requests that give rows, 0 to 1; the others are only counted. By default none does.

    With `opt_in`, only requests whose senders opted in give rows.
    """

    payload: float = 0.0
    prompt_rows: int = 0
    counterfactual_rows: int = 0
    opt_in: bool = False

    def permits(self, terms: Terms) -> bool:
        """Whether a request with these terms may give rows."""
        return terms.permitted and (terms.opted_in or not self.opt_in)

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
    opt_in: Any = header.get("opt_in", False)
    if type(opt_in) is not bool:
        raise ValueError(f"opt_in is {opt_in!r}, but must be true or false")
    return Policy(
        payload=float(payload), prompt_rows=prompt_rows, counterfactual_rows=counterfactual_rows, opt_in=opt_in
    )


def _fraction(rid: str) -> float:
    """Even over ids, from 0 up to 1."""
    return int.from_bytes(hashlib.blake2b(rid.encode(), digest_size=8).digest()) / 2**64

"""Which requests of a batch to capture, and how much of each. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """The parts of one request to capture, besides the light record of its steps.

    `payload` requests rows of the last `prompt_rows` prompt positions and of all output positions, and up to
    `counterfactual_rows` rows after a rejection in each step. `probability` is that with which a policy chose the request.
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
        """Those (indices into `places`) that want rows."""
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

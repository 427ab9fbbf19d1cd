"""Which requests to capture: those whose `sampling_params.custom_params` have options under "updraft".

Other requests are ignored, also those with malformed options, because the server may have other clients than the agent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEY = "updraft"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """What to capture of one request, besides the light record of its steps.

    `payload` requests rows of the last `prompt_rows` prompt positions and of all output positions, and up to
    `counterfactual_rows` rows after a rejection in each step.
    """

    payload: bool = False
    prompt_rows: int = 0
    counterfactual_rows: int = 0


def read_options(custom_params: object) -> CaptureOptions | None:
    """The capture options in a request's custom parameters; None if there are none."""
    options = custom_params.get(KEY) if isinstance(custom_params, Mapping) else None
    if not isinstance(options, Mapping):
        return None
    prompt_rows, counterfactual_rows = options.get("prompt_rows", 0), options.get("counterfactual_rows", 0)
    for rows in (prompt_rows, counterfactual_rows):
        if type(rows) is not int or rows < 0:
            return None
    return CaptureOptions(
        payload=options.get("payload") is True, prompt_rows=prompt_rows, counterfactual_rows=counterfactual_rows
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedRequests:
    """The requests of a batch with capture options, in batch order: `places` in the batch, ids, options."""

    batch_size: int
    places: tuple[int, ...]
    rids: tuple[str, ...]
    options: tuple[CaptureOptions, ...]

    @property
    def payload(self) -> tuple[int, ...]:
        """Those (indices into `places`) that want rows."""
        return tuple(i for i, options in enumerate(self.options) if options.payload)

    @property
    def payload_places(self) -> tuple[int, ...]:
        """Their places in the batch."""
        return tuple(self.places[i] for i in self.payload)


def captured_requests(requests: Sequence[Any] | None) -> CapturedRequests | None:
    """The requests with capture options; None if there are none."""
    options = [read_options(request.sampling_params.custom_params) for request in requests or ()]
    captured = [(place, read) for place, read in enumerate(options) if read is not None]
    if not captured or requests is None:
        return None
    return CapturedRequests(
        batch_size=len(requests),
        places=tuple(place for place, _ in captured),
        rids=tuple(str(requests[place].rid) for place, _ in captured),
        options=tuple(read for _, read in captured),
    )

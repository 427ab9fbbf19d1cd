"""Which requests to capture: the options that a request carries in its `sampling_params.custom_params`, under "updraft".

A request without one is not looked at. Malformed options count as none: the server serves others besides the agent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEY = "updraft"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """What is wanted of one request, besides the light record of its steps.

    `payload` asks for rows of the last `prompt_rows` prompt positions and of all output positions, and of up to
    `counterfactual_rows` rows after a rejection in each step.
    """

    payload: bool = False
    prompt_rows: int = 0
    counterfactual_rows: int = 0


def read_options(custom_params: object) -> CaptureOptions | None:
    """The options in a request's custom parameters; None if there is none."""
    said = custom_params.get(KEY) if isinstance(custom_params, Mapping) else None
    if not isinstance(said, Mapping):
        return None
    prompt_rows, counterfactual_rows = said.get("prompt_rows", 0), said.get("counterfactual_rows", 0)
    for rows in (prompt_rows, counterfactual_rows):
        if type(rows) is not int or rows < 0:
            return None
    return CaptureOptions(
        payload=said.get("payload") is True, prompt_rows=prompt_rows, counterfactual_rows=counterfactual_rows
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedRequests:
    """The requests of a batch that have capture options, in the batch's order: `places` in it, ids, options."""

    batch_size: int
    places: tuple[int, ...]
    rids: tuple[str, ...]
    options: tuple[CaptureOptions, ...]

    @property
    def payload(self) -> tuple[int, ...]:
        """Which of them (indices into `places`) want rows."""
        return tuple(i for i, options in enumerate(self.options) if options.payload)

    @property
    def payload_places(self) -> tuple[int, ...]:
        """Where in the batch those are."""
        return tuple(self.places[i] for i in self.payload)


def captured_requests(requests: Sequence[Any] | None) -> CapturedRequests | None:
    """Of SGLang's requests, those with capture options; None if there are none."""
    options = [read_options(request.sampling_params.custom_params) for request in requests or ()]
    wanted = [(place, read) for place, read in enumerate(options) if read is not None]
    if not wanted or requests is None:
        return None
    return CapturedRequests(
        batch_size=len(requests),
        places=tuple(place for place, _ in wanted),
        rids=tuple(str(requests[place].rid) for place, _ in wanted),
        options=tuple(read for _, read in wanted),
    )

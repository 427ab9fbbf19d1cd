"""Which requests of a batch to capture, and how much of each. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KEY = "updraft"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """The parts of one request to capture, besides the light record of its steps.

    `payload` requests rows of the last `prompt_rows` prompt positions and of all output positions, and up to
    `counterfactual_rows` rows after a rejection in each step. `probability` is that with which a policy chose the request; 0
    if the agent chose it itself.
    """

    payload: bool = False
    prompt_rows: int = 0
    counterfactual_rows: int = 0
    probability: float = 0.0


def read_options(custom_params: object) -> CaptureOptions | None:
    """The capture options under "updraft" in a request's custom parameters; None if there are none.

    Malformed options count as none, because the server may have other clients than the agent.
    """
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

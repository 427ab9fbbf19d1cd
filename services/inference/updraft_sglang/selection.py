"""The requests in the scheduler, and which give rows. The agent's policy and the sender's terms decide this once per request.

Each request gets its own id, which begins with SGLang's id. Clients choose SGLang's ids and may reuse them, but an id decides
what is captured and names a trace.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from updraft_sglang.marks import is_sealed, read_sealed
from updraft_tap.http.terms import Terms
from updraft_tap.policy import CapturedRequests, CaptureOptions, Policy, captured_requests

_ID_CHARS = 64
"""How much of a client's id, which may have any length, is in ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """A request in the scheduler. `options`: which rows it gives to the agent with this number; None for none."""

    id: str
    terms: Terms
    asked: bool
    options: CaptureOptions | None
    agent: int
    since_s: float = field(default_factory=time.perf_counter)


class Selection:
    """`forget` and `policy` belong to the channels' threads, everything else to the scheduler's thread."""

    def __init__(self, secret: str) -> None:
        self.policy = Policy()
        self._secret = secret
        self._agent = 0
        """How many agents there were before this one."""
        self._met: dict[str, Met] = {}
        self._num_captured = 0

    def forget(self) -> None:
        """Another agent has connected: do not send it rows that the previous one selected."""
        self.policy = Policy()
        self._agent += 1

    def meet(self, rid: str, received: Any) -> None:
        """A request arrives, as SGLang's scheduler receives it."""
        agent = self._agent  # read before the policy, which `forget` replaces before it counts
        params, own = received.sampling_params.custom_params, f"{rid[:_ID_CHARS]}-{uuid.uuid4().hex[:8]}"
        terms = read_sealed(params, self._secret)
        policy = self.policy
        options = policy.options(own) if policy.permits(terms) and _is_text(received) else None
        self.end(rid)
        self._met[rid] = Met(id=own, terms=terms, asked=is_sealed(params, self._secret), options=options, agent=agent)
        self._num_captured += options is not None

    def end(self, rid: str) -> Met | None:
        """Remove and return the request; None if it is unknown."""
        met = self._met.pop(rid, None)
        self._num_captured -= met is not None and met.options is not None
        return met

    def __contains__(self, rid: object) -> bool:
        return rid in self._met

    def is_captured(self, met: Met) -> bool:
        """Whether the current agent gets rows of the request."""
        return met.options is not None and met.agent == self._agent

    def captured(self, requests: Sequence[Any] | None) -> CapturedRequests | None:
        """The requests of a batch that give rows; None if there are none."""
        if not self._num_captured:
            return None
        return captured_requests([self._entry(one.rid) for one in requests or ()])

    def clear(self) -> None:
        """Forget all requests."""
        self._met.clear()
        self._num_captured = 0

    def _entry(self, rid: str) -> tuple[str, CaptureOptions | None]:
        met = self._met.get(rid)
        return (met.id, met.options) if met is not None and self.is_captured(met) else (rid, None)


def _is_text(received: Any) -> bool:
    """Rows of a prompt that is more than its tokens, or of an adapter, are none of the target's.

    A turn of a session begins with the text of earlier turns, whose senders may have opted out.
    """
    is_more = (received.mm_inputs, received.input_embeds, received.lora_id, received.session_params)
    return all(one is None for one in is_more)

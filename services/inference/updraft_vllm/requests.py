"""The hooks around the scheduler: the counters of every request, and what became of it. No tensor is read.

They are the same for both model runners, and see every request, whoever sent it.
"""

import logging
import time
from typing import Any

from updraft_tap.channel import Channel
from updraft_tap.finished import Counters, Finished, Payload
from updraft_tap.hooks import Guard, Hook, logged_guard
from updraft_tap.http.terms import has_mark, read_mark
from updraft_tap.policy import Policy
from updraft_tap.steps import VERSION_ATTRIBUTE
from updraft_vllm.rows import wanted

log = logging.getLogger(__name__)

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


class RequestHooks:
    """The hook bodies. Each calls `original` once with its own arguments."""

    def __init__(self, *, channel: Channel) -> None:
        self.policy = Policy()
        self.guard = Guard(failed=channel.failed, unhooked=lambda _, reason: channel.end(reason))
        self._extras = logged_guard(log, "cannot tell how much of a prompt was cached")
        self._channel = channel
        self._counters = Counters()
        self._agent = 0
        """How many agents there were before this one; counted by the channel's thread."""
        self._counted_for = 0
        """The agent for which the counters are."""
        self._captured: dict[str, tuple[int, float]] = {}
        """By captured request, the agent for which it was chosen, and with what probability."""
        self._cached: dict[str, int] = {}
        """By captured request, its tokens that vLLM did not compute when it scheduled the request first."""

    def forget(self) -> None:
        """Another agent is there: give it nothing that the one before chose. Called on the channel's thread."""
        self.policy = Policy()
        self._agent += 1

    def add(self, original: Hook, scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.add_request."""
        if self.policy.payload and self._channel.is_open:
            self.guard("add", self._meet, request)
        return original(scheduler, request, *args, **kwargs)

    def update(
        self, original: Hook, scheduler: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """AROUND Scheduler.update_from_output, once per step, with the tokens that each request got."""
        if self._channel.is_open:
            self._extras("cached", self._look_up_cached, scheduler_output)
            self.guard("counters", self._count, scheduler, scheduler_output, model_runner_output)
        return original(scheduler, scheduler_output, model_runner_output, *args, **kwargs)

    def free(self, original: Hook, scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler._free_request: a request ended, by whatever reason."""
        result = original(scheduler, request, *args, **kwargs)
        self.guard("finished", self._end, request)
        return result

    def pause(self, original: Hook, scheduler: Any, pause_state: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.set_pause_state, which ends or begins a time without steps."""
        self._counters.pause()
        return original(scheduler, pause_state, *args, **kwargs)

    def _meet(self, request: Any) -> None:
        agent = self._agent  # read before the policy, which `forget` replaces before it counts
        options = wanted(self.policy, request.request_id, request)
        if options is not None:
            self._captured[request.request_id] = agent, options.probability

    def _begin(self) -> None:
        """Drop the counts for the previous agent, and times that include steps nobody counted."""
        if self._counted_for != self._agent:
            self._counted_for = self._agent
            self._counters.forget()

    def _look_up_cached(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id in self._captured:  # one that was preempted may be new again
                self._cached.setdefault(new.req_id, new.num_computed_tokens)

    def _count(self, scheduler: Any, scheduler_output: Any, output: Any) -> None:
        """Once per step over all its requests, so it looks at each of them once."""
        self._begin()
        drafts = scheduler_output.scheduled_spec_decode_tokens
        invalid = scheduler_output.num_invalid_spec_tokens or {}
        alive = []
        for rid in scheduler_output.num_scheduled_tokens:
            request = scheduler.requests.get(rid)
            if request is None or request.is_finished():
                continue
            alive.append(rid)
            of_request = drafts.get(rid)
            tokens = output.sampled_token_ids[output.req_id_to_index[rid]] if of_request else ()
            if tokens:  # else the step is not judged, as vLLM's own counters have it
                proposed = len(of_request) - invalid.get(rid, 0)
                self._counters.verified(rid, proposed=proposed, accepted=min(proposed, len(tokens) - 1))
        self._counters.proposed(alive, getattr(output, VERSION_ATTRIBUTE, None))

    def _end(self, request: Any) -> None:
        self._begin()
        rid, params = request.request_id, request.sampling_params
        agent, probability = self._captured.pop(rid, (-1, 0.0))
        counters, num_cached, payload = self._counters.end(rid), self._cached.pop(rid, 0), None
        if not self._channel.is_open or params is None:
            return
        if agent == self._agent:
            sampling = {name: getattr(params, name) for name in _SAMPLING}
            payload = Payload(
                tokens=list(request.all_token_ids),
                sampling=sampling,
                probability=probability,
                num_cached=min(num_cached, request.num_prompt_tokens),
            )
        ended = Finished(
            rid=rid,
            terms=read_mark(params.extra_args),
            asked=has_mark(params.extra_args),
            finish=request.status.name.removeprefix("FINISHED_").lower(),
            prompt_tokens=request.num_prompt_tokens,
            output_tokens=len(request.output_token_ids),
            preemptions=request.num_preemptions,
            duration_s=time.time() - request.arrival_time,
            constrained=bool(getattr(request, "use_structured_output", False)),
            counters=counters,
            payload=payload,
        )
        self._channel.offer(ended)

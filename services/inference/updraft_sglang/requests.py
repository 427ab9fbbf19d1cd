"""The hooks around the scheduler: the counters of every request, and how it ended. They read no tensors.

A request ends when its last output leaves the scheduler, or when it is aborted while it waits.
"""

import time
from collections.abc import Sequence
from typing import Any

from updraft_sglang.selection import Met, Selection
from updraft_tap.channel import Channel
from updraft_tap.finished import Counters, Finished, Payload
from updraft_tap.hooks import Guard, Hook
from updraft_tap.steps import VERSION_ATTRIBUTE
from updraft_tap.weights import ServedVersion

_HEALTH_CHECK = "HEALTH_CHECK"
"""Prefix of the ids of the server's requests to itself."""
_FINISHES = {"stop": "stopped", "length": "length_capped", "abort": "aborted"}
"""Names on the wire of SGLang's reasons."""
_GREEDY = 1
"""SGLang turns a temperature of 0 into this top_k."""
_ALL = 1 << 30
"""SGLang's top_k for the whole vocabulary."""


class RequestHooks:
    """The hook bodies. Each calls `original` once with its own arguments. They do nothing before `is_active` is set."""

    def __init__(self, *, channel: Channel, selection: Selection, served: ServedVersion) -> None:
        self.is_active = False
        self.guard = Guard(failed=channel.failed, unhooked=self._unhooked)
        self._channel = channel
        self._selection = selection
        self._served = served
        self._counters = Counters()
        self._agent = 0
        """How many agents there were before this one; counted by the channel's thread."""
        self._counted_for = 0
        """The number of the agent that gets the current counts."""

    def forget(self) -> None:
        """Another agent has connected: do not send it counts for the previous one. Called on the channel's thread."""
        self._agent += 1

    def add(self, original: Hook, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.handle_generate_request."""
        if self.is_active:
            self.guard("add", self._meet, recv_req)
        return original(scheduler, recv_req, *args, **kwargs)

    def judge(self, original: Hook, processor: Any, result: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND the part of result processing that learns what each request of a verify step accepted."""
        is_counted = self.is_active and self._channel.is_open
        alive = self.guard("counters", self._alive, batch.reqs) if is_counted else None
        tokens = original(processor, result, batch, *args, **kwargs)
        if alive:
            self.guard("counters", self._count, alive, result)
        return tokens

    def step(self, original: Hook, scheduler: Any, batch: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.process_batch_result, once per step."""
        done = original(scheduler, batch, result, *args, **kwargs)
        if self.is_active and self._channel.is_open:
            self.guard("counters", self._stepped, batch)
        return done

    def resume(self, original: Hook, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.continue_generation, which ends a time without steps."""
        self._counters.pause()
        return original(scheduler, *args, **kwargs)

    def stream(self, original: Hook, streamer: Any, reqs: Any, return_logprob: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND SchedulerOutputStreamer.stream_output: the outputs of a batch leave the scheduler."""
        skipped = kwargs.get("skip_req", args[0] if args else None)
        ending = self.guard("finished", self._ending, reqs, skipped) if self.is_active else None
        done = original(streamer, reqs, return_logprob, *args, **kwargs)
        for request in ending or ():
            self.guard("finished", self._end, request)
        return done

    def abort(self, original: Hook, scheduler: Any, abort_req: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND Scheduler.send_abort_output: a waiting request ends."""
        done = original(scheduler, abort_req, req, *args, **kwargs)
        if self.is_active:
            self.guard("finished", self._end, req)
        return done

    def _meet(self, received: Any) -> None:
        """Leave out requests without a client: the server's requests to itself, and those for no token, which SGLang sends for
        the common prompt of several choices."""
        if received.sampling_params.max_new_tokens != 0 and not received.rid.startswith(_HEALTH_CHECK):
            self._selection.meet(received.rid, received)

    def _alive(self, requests: Sequence[Any] | None) -> list[tuple[int, str]]:
        """Running requests with their places. With overlap, a step may verify requests that ended or were retracted."""
        return [
            (place, one.rid)
            for place, one in enumerate(requests or ())
            if one.rid in self._selection and not one.finished() and not one.is_retracted
        ]

    def _count(self, alive: Sequence[tuple[int, str]], result: Any) -> None:
        self._begin()
        width = result.speculative_output_stride or result.speculative_num_draft_tokens
        proposed = width - result.num_non_draft_tokens_per_req
        if proposed <= 0:  # drafting is off
            return
        for place, rid in alive:
            self._counters.drafted(rid, getattr(result, VERSION_ATTRIBUTE, None))
            accepted = min(proposed, result.num_correct_drafts_per_req_cpu[place])
            self._counters.verified(rid, proposed=proposed, accepted=accepted)

    def _stepped(self, batch: Any) -> None:
        self._begin()
        self._counters.proposed([rid for _, rid in self._alive(batch.reqs)], self._served.version)

    def _begin(self) -> None:
        """Drop the counts for the previous agent, and durations that include uncounted steps."""
        if self._counted_for != self._agent:
            self._counted_for = self._agent
            self._counters.forget()

    def _ending(self, requests: Sequence[Any], skipped: Any) -> list[Any]:
        return [one for one in requests if one is not skipped and one.finished() and not one.finished_output]

    def _end(self, request: Any) -> None:
        self._begin()
        counters, met = self._counters.end(request.rid), self._selection.end(request.rid)
        if met is not None and self._channel.is_open:
            self._channel.offer(self._finished(request, met, counters))

    def _finished(self, request: Any, met: Met, counters: list[dict[str, Any]]) -> Finished:
        prompt, output, payload = request.origin_input_ids, request.output_ids_through_stop, None
        if met.options is not None and self._selection.is_captured(met):
            sampling = _sampling(request.sampling_params)
            payload = Payload(
                tokens=[*prompt, *output],
                sampling=sampling,
                probability=met.options.probability,
                num_cached=getattr(request, "cached_tokens", 0),
            )
        return Finished(
            rid=met.id,
            terms=met.terms,
            asked=met.asked,
            finish=_finish(request),
            prompt_tokens=len(prompt),
            output_tokens=len(output),
            preemptions=request.retraction_count,
            duration_s=time.perf_counter() - met.since_s,
            constrained=_is_constrained(request.sampling_params),
            counters=counters,
            payload=payload,
        )

    def _unhooked(self, _: str, reason: str) -> None:
        self.is_active = False
        self._selection.clear()
        self._counters.forget()
        self._channel.end(reason)


def _finish(request: Any) -> str:
    """Why a request ended. A request that was aborted while it waited has no reason in SGLang."""
    if request.finished_reason is None:
        return "aborted"
    kind = str(request.finished_reason.to_json()["type"])
    return _FINISHES.get(kind, kind)


def _is_constrained(params: Any) -> bool:
    return any((params.json_schema, params.regex, params.ebnf, params.structural_tag))


def _sampling(params: Any) -> dict[str, Any]:
    """The parameters on the wire, with vLLM's meanings: temperature 0 is greedy, and top_k 0 is no limit."""
    is_greedy = params.top_k == _GREEDY
    return {
        "temperature": 0.0 if is_greedy else params.temperature,
        "top_p": params.top_p,
        "top_k": 0 if is_greedy or params.top_k >= _ALL else params.top_k,
        "min_p": params.min_p,
        "seed": params.sampling_seed,
        "max_tokens": params.max_new_tokens,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
    }

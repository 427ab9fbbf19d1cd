"""The hooks around a model runner's step: rows of captured requests, swaps between two steps, and the version that drafted.

A step is `execute_model`, then `sample_tokens`, in which the drafts of the next step are proposed. Rows are copied before
sampling, which changes the logits (penalties, grammars, temperature). Without captured requests nothing is read of a tensor.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from updraft_tap import prefills, steps
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.channel import Channel
from updraft_tap.distribution import chosen
from updraft_tap.hooks import Guard, Hook
from updraft_tap.http.terms import read_mark
from updraft_tap.policy import CaptureOptions, Policy
from updraft_tap.staging import Build, Mark, Staged, StagedMessage, copy_stream, elapsed_us, mark
from updraft_tap.weights import ServedVersion
from updraft_vllm.layout import Layout, layout
from updraft_vllm.runners import Runner, Step

STATE = "execute_model_state"
"""The attribute of both runners that is set from the end of a forward until its tokens are sampled."""


@dataclass(slots=True, kw_only=True)
class _Step:
    """A step in progress with captured requests."""

    scheduler_output: Any
    start: Mark
    agent: int
    """For which it is."""
    read: Step | None = None
    layout: Layout | None = None
    rows: dict[str, Tensor] | None = None
    staged: Staged | None = None


class RowHooks:
    """The hook bodies. Each calls `original` once with its own arguments."""

    def __init__(
        self, *, channel: Channel, between: BetweenSteps, served: ServedVersion, runner: Runner, top_k: int
    ) -> None:
        self.policy = Policy()
        """Set by the channel's thread; requests that are already known keep what was decided."""
        self.guard = Guard(failed=channel.failed, unhooked=self._unhooked)
        self._channel = channel
        self._between = between
        self._served = served
        self._runner = runner
        self._top_k = top_k
        self._agent = 0
        """How many agents there were before this one; counted by the channel's thread."""
        self._chosen_for = 0
        """The agent for which the requests with options were chosen."""
        self._options: dict[str, CaptureOptions] = {}
        self._fresh: set[str] = set()
        """Captured requests that have not read their first chunk, of their prompt or after a preemption."""
        self._proposers: dict[str, int] = {}
        self._step: _Step | None = None
        self._stream: Any = None
        self._has_stream = False

    def forget(self) -> None:
        """Another agent is there: give it nothing that the one before chose. Called on the channel's thread."""
        self.policy = Policy()
        self._agent += 1

    def execute(self, original: Hook, runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND execute_model: the forward of a step."""
        if kwargs.get("dummy_run"):  # of the second runner, which samples nothing afterwards
            return original(runner, scheduler_output, *args, **kwargs)
        self._between.begin()
        self._step = None
        try:
            if self._options or self.policy.payload:
                self.guard("rows", self._begin, runner, scheduler_output)
            result = original(runner, scheduler_output, *args, **kwargs)
        except BaseException:
            self._between.end()
            raise
        if getattr(runner, STATE, None) is None:  # nothing will be sampled
            self._between.end()
        return result

    def sample_tokens(self, original: Hook, runner: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND sample_tokens: sampling, and the proposals of the next step, whose version is told before it may change."""
        try:
            if self._step is not None and getattr(runner, STATE, None) is not None:
                self.guard("rows", self._read, runner)
            result = original(runner, *args, **kwargs)
            if self._step is not None:
                self.guard("rows", self._finish)
            self.guard("version", self._tell_version, result)
            return result
        finally:
            self._step = None
            self._between.end()

    def sample(self, original: Hook, runner: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND the function that decides what is accepted."""
        result = original(runner, *args, **kwargs)
        if self._step is not None and self._step.rows is not None:
            self.guard("rows", self._stage, result)
        return result

    def compute_logits(self, original: Hook, *args: Any, **kwargs: Any) -> Any:
        """AROUND the target's compute_logits, where the runner calls it within sampling, before grammars mask them."""
        logits = original(*args, **kwargs)
        step = self._step
        if step is not None and step.read is not None and step.rows is None and logits is not None:
            self.guard("rows", self._collect, logits)
        return logits

    def _begin(self, runner: Any, scheduler_output: Any) -> None:
        if self._chosen_for != self._agent:
            self._chosen_for = self._agent
            self._clear()
        for rid in scheduler_output.finished_req_ids:
            self._options.pop(rid, None)
            self._proposers.pop(rid, None)
            self._fresh.discard(rid)
        for new in scheduler_output.scheduled_new_reqs:
            self._meet(new)
        self._fresh |= scheduler_output.scheduled_cached_reqs.resumed_req_ids & self._options.keys()
        if self._channel.is_open and not self._options.keys().isdisjoint(scheduler_output.num_scheduled_tokens):
            self._step = _Step(
                scheduler_output=scheduler_output, start=mark(self._copies(runner)), agent=self._chosen_for
            )

    def _meet(self, new: Any) -> None:
        if new.req_id in self._options:  # the second runner sends a preempted request as a new one
            self._fresh.add(new.req_id)
            return
        options = wanted(self.policy, new.req_id, new)
        if options is not None and self._channel.is_open:
            self._options[new.req_id] = options
            self._fresh.add(new.req_id)

    def _copies(self, runner: Any) -> Any:
        if not self._has_stream:
            self._stream, self._has_stream = copy_stream(runner.device), True
        return self._stream

    def _read(self, runner: Any) -> None:
        step = self._step
        assert step is not None
        read = self._runner.read_step(runner, step.scheduler_output, self._fresh.__contains__)
        step.layout = layout(read.batch, self._options)
        self._fresh.difference_update(read.batch.rids)
        if step.layout is not None:
            step.read = read
            if read.logits is not None:
                self._collect(read.logits)

    def _collect(self, logits: Tensor) -> None:
        step = self._step
        assert step is not None
        assert step.layout is not None
        assert step.read is not None
        read, spans, wanted_steps = step.read, step.layout.spans, step.layout.steps
        step.rows = {}
        if spans:
            rows = prefills.collect_prefill_rows(spans, logits_BV=logits, states=read.states, top_k=self._top_k)
            self._offer(step, Staged(rows, self._stream), lambda rows: (prefills.header(spans), rows))
        if wanted_steps is not None:
            step.rows = steps.collect_step_rows(
                wanted_steps,
                tokens_M=read.tokens,
                positions_S=chosen(read.positions, wanted_steps.state_rows),
                logits_NV=logits,
                states=read.states,
                top_k=self._top_k,
            )

    def _stage(self, result: Any) -> None:
        step = self._step
        assert step is not None
        assert step.layout is not None
        if step.rows:
            lens = chosen(self._runner.accept_lens(result), step.layout.roots).clone()
            step.staged = Staged({**step.rows, "accept_lens": lens}, self._stream)

    def _finish(self) -> None:
        step = self._step
        assert step is not None
        if step.layout is not None and step.layout.steps is not None and step.staged is not None:
            rows = step.layout.steps
            versions = tuple(self._proposers.get(rid, 0) for rid in rows.captured.rids)
            message = steps.StepMessage(rows=rows, versions=versions)
            start, end = step.start, mark(self._stream)
            self._offer(step, step.staged, lambda rows: message.message(rows, elapsed_us(start, end)))
        ran = self._options.keys() & step.scheduler_output.num_scheduled_tokens.keys()
        self._proposers.update(dict.fromkeys(ran, self._served.version))

    def _tell_version(self, result: Any) -> None:
        for name in ("_model_runner_output", "model_runner_output"):  # of an output that is still on the device
            result = getattr(result, name, result)
        if result is not None:
            setattr(result, steps.VERSION_ATTRIBUTE, self._served.version)

    def _offer(self, step: _Step, staged: Staged, build: Build) -> None:
        if step.agent == self._agent:
            self._channel.offer(StagedMessage(staged, build))

    def _clear(self) -> None:
        self._options.clear()
        self._proposers.clear()
        self._fresh.clear()

    def _unhooked(self, name: str, reason: str) -> None:
        if name == "rows":
            self._clear()
            self._channel.end(reason)
        else:
            self._channel.restate()


def wanted(policy: Policy, rid: str, request: Any) -> CaptureOptions | None:
    """The options of a text request whose sender permits capture; takes the request of either process."""
    terms = read_mark(getattr(request.sampling_params, "extra_args", None))
    return policy.options(rid) if policy.permits(terms) and _is_text(request) else None


def _is_text(request: Any) -> bool:
    """Whether the target alone generates from token ids: without images, embeddings or an adapter."""
    return request.lora_request is None and request.prompt_embeds is None and not request.mm_features

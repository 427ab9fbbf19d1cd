"""The hooks around the worker's forward: rows of captured requests, copied before SGLang samples, and swaps between forwards.

Errors never reach SGLang. Without captured requests, no tensors are read. The scheduler has a single thread, so only one
forward is in progress at a time.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from updraft_sglang.selection import Selection
from updraft_tap import prefills, steps
from updraft_tap.between_steps import BetweenSteps
from updraft_tap.channel import Channel
from updraft_tap.distribution import chosen
from updraft_tap.hooks import Guard, Hook
from updraft_tap.policy import CapturedRequests
from updraft_tap.staging import Mark, Staged, StagedMessage, copy_stream, elapsed_us, mark
from updraft_tap.weights import ServedVersion


class ScheduleBatch(Protocol):
    """The fields of SGLang's ScheduleBatch that are used here."""

    reqs: Any
    seq_lens: Tensor
    prefix_lens: Any
    extend_lens: Any


@dataclass(slots=True, kw_only=True)
class _Forward:
    """A forward of the worker in progress."""

    batch: ScheduleBatch
    captured: CapturedRequests
    version: int
    stream: torch.cuda.Stream | None
    start: Mark
    rows: steps.StepRows | None = field(default=None)
    staged: Staged | None = field(default=None)


class RowHooks:
    """The hook bodies. Each calls `original` once with its own arguments."""

    def __init__(
        self, *, channel: Channel, selection: Selection, between: BetweenSteps, served: ServedVersion, top_k: int
    ) -> None:
        self.guard = Guard(failed=channel.failed, unhooked=self._unhooked)
        self._channel = channel
        self._selection = selection
        self._between = between
        self._served = served
        self._top_k = top_k
        self._forward: _Forward | None = None
        self._streams: dict[torch.device, torch.cuda.Stream | None] = {}

    def forward(self, original: Hook, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND EAGLEWorkerV2.forward_batch_generation: a prefill, or drafting, verification and what follows."""
        self._between.begin()
        forward = self._forward = self.guard("rows", self._begin, batch) if self._channel.is_open else None
        try:
            result = original(worker, batch, *args, **kwargs)
            if forward is not None and forward.staged is not None:
                self.guard("rows", self._finish, forward)
            self.guard("version", setattr, result, steps.VERSION_ATTRIBUTE, self._served.version)
            return result
        finally:
            self._forward = None
            self._between.end()

    def verify(
        self, original: Hook, verify_input: Any, batch: Any, logits_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """AROUND eagle_sample, which decides what is accepted and changes the logits."""
        forward = self._forward
        if forward is None or batch is not forward.batch:
            return original(verify_input, batch, logits_output, *args, **kwargs)
        rows = self.guard("rows", self._collect, forward, verify_input, logits_output)
        result = original(verify_input, batch, logits_output, *args, **kwargs)
        if rows is not None:
            self.guard("rows", self._stage, forward, rows, result)
        return result

    def prefill(self, original: Hook, runner: Any, logits_output: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND ModelRunner.sample, which changes the logits. Within a forward it belongs to the target's prefill."""
        if self._forward is not None:
            self.guard("rows", self._prefilled, self._forward, runner, logits_output)
        return original(runner, logits_output, *args, **kwargs)

    def _begin(self, batch: ScheduleBatch) -> _Forward | None:
        captured = self._selection.captured(batch.reqs)
        if captured is None:
            return None
        stream = self._stream(batch.seq_lens.device)
        return _Forward(batch=batch, captured=captured, version=self._served.version, stream=stream, start=mark(stream))

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device not in self._streams:
            self._streams[device] = copy_stream(device)
        return self._streams[device]

    def _collect(self, forward: _Forward, verify_input: Any, logits_output: Any) -> dict[str, Tensor]:
        batch_size, captured = len(forward.batch.seq_lens), forward.captured
        if batch_size != captured.batch_size:
            raise ValueError(f"{captured.batch_size} requests do not fit {batch_size} sequences")
        tokens_M = verify_input.draft_token
        forward.rows = steps.even_rows(captured, len(tokens_M) // batch_size)
        return steps.collect_step_rows(
            forward.rows,
            tokens_M=tokens_M,
            positions_S=chosen(forward.batch.seq_lens, captured.places),
            logits_NV=logits_output.next_token_logits,
            states=(_states(logits_output),),
            top_k=self._top_k,
        )

    def _stage(self, forward: _Forward, rows: dict[str, Tensor], result: Any) -> None:
        _, accept_lens_B, _ = result
        lens_S = chosen(accept_lens_B, forward.captured.places).clone()
        forward.staged = Staged({**rows, "accept_lens": lens_S}, forward.stream)

    def _finish(self, forward: _Forward) -> None:
        assert forward.staged is not None
        assert forward.rows is not None
        versions = (forward.version,) * len(forward.captured.places)
        step = steps.StepMessage(rows=forward.rows, versions=versions)
        # Not `forward` itself: a queued message must not keep its batch alive.
        start, end = forward.start, mark(forward.stream)
        self._channel.offer(StagedMessage(forward.staged, lambda rows: step.message(rows, elapsed_us(start, end))))

    def _prefilled(self, forward: _Forward, runner: Any, logits_output: Any) -> None:
        if runner.is_draft_worker:
            return
        batch = forward.batch
        chunks = list(zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True))
        spans = prefills.captured_spans(
            forward.captured,
            {place: _chunk(*chunks[place]) for place in forward.captured.places},
            first_rows=list(accumulate(batch.extend_lens, initial=0)),
            logit_rows=range(len(chunks)),
        )
        if not spans:
            return
        rows = prefills.collect_prefill_rows(
            spans,
            logits_BV=logits_output.next_token_logits,
            states=(_states(logits_output),),
            top_k=self._top_k,
        )
        self._channel.offer(StagedMessage(Staged(rows, forward.stream), lambda rows: (prefills.header(spans), rows)))

    def _unhooked(self, name: str, reason: str) -> None:
        if name == "rows":
            self._channel.end(reason)
        else:
            self._channel.restate()


def _states(logits_output: Any) -> Tensor:
    if logits_output.hidden_states_token_indices is not None:
        raise ValueError("SGLang keeps only some hidden states of this model")
    states: Tensor = logits_output.hidden_states
    return states


def _chunk(request: Any, prefix_len: int, extend_len: int) -> prefills.PromptChunk:
    prompt_tokens = len(request.origin_input_ids)
    return prefills.PromptChunk(
        start=prefix_len,
        end=prefix_len + extend_len,
        prompt_tokens=prompt_tokens,
        total_tokens=prompt_tokens + len(request.output_ids),
        is_first=request.extend_batch_idx <= 1,
    )

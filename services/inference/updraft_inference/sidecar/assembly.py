"""Puts the messages of a server's processes together: the counts of every request, and the traces of the captured ones. Pure.

Text and counts of a request come from one process at its end, its rows from another one while it runs, in no common order. So
rows wait for the end, and an end waits a little for its rows. Rows that do not come are missing in the trace, never invented.
Times are monotonic seconds.
"""

import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from updraft_inference.agent.domains import label
from updraft_inference.agent.selection import CaptureTerms
from updraft_inference.engine import (
    CaptureLoss,
    CountedRequest,
    CountedSteps,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)
from updraft_inference.sidecar.hello import line
from updraft_inference.tap import messages
from updraft_inference.tap.messages import count
from updraft_inference.tap.trace_builder import RowBlocks, Rows, StepPart, TraceBuilder
from updraft_tap import wire

logger = logging.getLogger(__name__)

_Parts = Callable[[Mapping[str, Any], Mapping[str, Tensor]], Iterator[tuple[str, Rows | StepPart]]]

PATIENCE_S = 2.0
"""How long an ended request waits for the rest of its rows."""

SILENCE_S = 600.0
"""After so long without a message, the end of a request was lost."""

_NUM_ENDED = 1 << 14
"""How many of the newest ended requests are remembered, so that parts that come after the end are known as late."""

_ID_CHARS = 256
_REGION_CHARS = 63
_DIGEST_CHARS = 64

_MAX_UINT32 = 2**32 - 1

_MALFORMED = (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError, RuntimeError)
"""Errors from reading a malformed message, also those of torch's operations on its rows."""

_Form = dict[str, tuple[torch.dtype, torch.Size]]
"""Type and row shape of each tensor of a request's rows."""

_REASONS = {"stopped": FinishReason.STOP, "length_capped": FinishReason.LENGTH, "repetition": FinishReason.STOP}
"""Reasons by the words of `wire.FINISHES`. All other words mean that the answer was cut off."""

_MAX_UNKNOWN = 16
"""Unknown words that are remembered, so that each is logged once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A request that ended. `finished` is None if it leaves no trace; `probability` is that with which it was chosen."""

    trace_id: bytes
    counted: CountedRequest
    terms: CaptureTerms
    probability: float = 0.0
    finished: FinishedRequest | None = None


@dataclass(slots=True, kw_only=True)
class _Running:
    """A captured request whose end has not come."""

    probability: float
    heard_s: float
    parts: list[Rows | StepPart] = field(default_factory=list)
    blocks: RowBlocks = field(default_factory=RowBlocks)
    form: _Form = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class _Waiting:
    """An ended request whose last rows have not come."""

    ended: Ended
    builder: TraceBuilder
    blocks: RowBlocks
    form: _Form
    due_s: float
    num_bytes: int


class Assembler:
    """Takes messages of both processes; `max_bytes` limits the rows that wait, as `pack` makes them: a whole request waits for
    its end. Work is slow, so it has a thread of its own."""

    def __init__(self, *, max_bytes: int, pack: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        self._pack = pack
        self.losses: Counter[CaptureLoss] = Counter()
        self._max_bytes = max_bytes
        self._running: OrderedDict[str, _Running] = OrderedDict()
        """The one that was heard of last comes last."""
        self._waiting: dict[str, _Waiting] = {}
        self._over: OrderedDict[str, None] = OrderedDict()
        """The requests that were completed last."""
        self._num_bytes = 0
        self._unknown_finishes: set[str] = set()

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def num_bytes(self) -> int:
        """Size of all rows that wait."""
        return self._num_bytes

    def take(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], now_s: float) -> Iterator[Ended]:
        """Take a message, as far as it is iterated; yield the requests that it completes. Raises FrameError if it is malformed,
        after those that were complete before the defect."""
        try:
            yield from self._take(header, tensors, now_s)
        except _MALFORMED as error:
            self.losses[CaptureLoss.MALFORMED] += 1
            raise wire.FrameError(f"malformed message from the plugin: {error!r}") from error

    def due(self, now_s: float) -> list[Ended]:
        """The ended requests that waited long enough. Requests that fell silent are forgotten."""
        while self._running and (first := next(iter(self._running.items())))[1].heard_s + SILENCE_S < now_s:
            self._num_bytes -= self._running.pop(first[0]).num_bytes
            self.losses[CaptureLoss.UNKNOWN] += 1
        return [self._completed(rid) for rid, waiting in list(self._waiting.items()) if waiting.due_s <= now_s]

    def cut_off(self) -> list[Ended]:
        """No more rows come: complete what has ended with what there is, and forget the rest."""
        self._running.clear()
        ended = [self._completed(rid) for rid in list(self._waiting)]
        self._num_bytes = 0
        return ended

    def _take(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], now_s: float) -> Iterator[Ended]:
        kind = header["kind"]
        if kind == "finished":
            yield from self._end(header, tensors, now_s)
        elif kind in ("steps", "prefill"):
            parts: _Parts = messages.steps if kind == "steps" else messages.prefills
            if "aux" in tensors:
                tensors = {**tensors, "aux": self._pack(tensors["aux"])}
            for request, (rid, part) in zip(header["requests"], parts(header, tensors), strict=True):
                yield from self._add(_id(rid), part, _probability(request), now_s)

    def _add(self, rid: str, part: Rows | StepPart, probability: float, now_s: float) -> Iterator[Ended]:
        waiting = self._waiting.get(rid)
        if waiting is None and rid in self._over:
            self.losses[CaptureLoss.UNKNOWN] += 1
            return
        part = self._fitting(part)
        if waiting is not None:
            _check_form(waiting.form, part)
            waiting.ended = replace(waiting.ended, probability=min(waiting.ended.probability, probability))
            _build(waiting.builder, waiting.blocks.keep(part))
            waiting.num_bytes += part.nbytes
            self._num_bytes += part.nbytes
            if waiting.builder.covers(waiting.ended.counted.num_output):
                yield self._completed(rid)
            return
        running = self._running.get(rid) or _Running(probability=probability, heard_s=now_s)
        _check_form(running.form, part)
        running.heard_s = now_s
        running.parts.append(running.blocks.keep(part))
        running.num_bytes += part.nbytes
        self._num_bytes += part.nbytes
        self._running[rid] = running
        self._running.move_to_end(rid)

    def _fitting(self, part: Rows | StepPart) -> Rows | StepPart:
        """The part without its rows if there is no room for them."""
        if not part.nbytes or self._num_bytes + part.nbytes <= self._max_bytes:
            return part
        self.losses[CaptureLoss.MEMORY] += 1
        if isinstance(part, StepPart):
            return part.without_rows
        return Rows(position=part.end, aux=part.aux[:0], teacher=part.teacher[:0])

    def _end(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], now_s: float) -> Iterator[Ended]:
        rid = _id(str(header["rid"]))
        ended = _ended(rid, header)
        self._check_finish(line(str(header["finish"])))
        leaves_trace = "tokens" in tensors and not ended.terms.is_opted_out
        finished = _finished(rid, header, tensors["tokens"], ended) if leaves_trace else None
        probability = 0.0 if finished is None else _probability(header)
        running = self._running.pop(rid, None)
        if finished is None:
            if running is not None:  # chosen by one process only, as while the policy changes
                self._num_bytes -= running.num_bytes
                self.losses[CaptureLoss.UNKNOWN] += 1
            self._forget(rid)
            yield ended
            return
        if rid in self._waiting:  # an end that was said twice
            yield self._completed(rid)
        builder = TraceBuilder(ended.counted.num_prompt)
        for part in running.parts if running is not None else ():
            _build(builder, part)
        if running is not None:  # each process chose it by the same number, so both did with the smaller probability
            probability = min(probability, running.probability)
        self._waiting[rid] = _Waiting(
            ended=replace(ended, finished=finished, probability=probability),
            builder=builder,
            blocks=RowBlocks() if running is None else running.blocks,
            form={} if running is None else running.form,
            due_s=now_s + PATIENCE_S,
            num_bytes=0 if running is None else running.num_bytes,
        )
        if builder.covers(ended.counted.num_output):
            yield self._completed(rid)

    def _check_finish(self, finish: str) -> None:
        """Log an unknown word once."""
        is_known = finish in wire.FINISHES or finish in self._unknown_finishes
        if not is_known and len(self._unknown_finishes) < _MAX_UNKNOWN:
            self._unknown_finishes.add(finish)
            logger.warning("Requests end in an unknown way, which counts as cut off", extra={"finish": finish})

    def _completed(self, rid: str) -> Ended:
        """The request with its trace; without one if its rows do not fit each other. The counts are right then too."""
        waiting = self._waiting.pop(rid)
        self._num_bytes -= waiting.num_bytes
        self._forget(rid)
        try:
            return _traced(waiting)
        except _MALFORMED as error:
            self.losses[CaptureLoss.MALFORMED] += 1
            logger.error("A request leaves no trace: its rows are malformed", extra={"reason": repr(error)})
            return replace(waiting.ended, finished=None)

    def _forget(self, rid: str) -> None:
        """Parts of this request that come from now on are late."""
        self._over[rid] = None
        self._over.move_to_end(rid)
        if len(self._over) > _NUM_ENDED:
            self._over.popitem(last=False)


def _traced(waiting: _Waiting) -> Ended:
    ended, finished = waiting.ended, waiting.ended.finished
    assert finished is not None
    builder, num_output = waiting.builder, finished.num_output
    finished = replace(
        finished, steps=builder.steps(num_output), hidden=builder.hidden(num_output) if num_output else None
    )
    captured = sum(bool(step.draft_ids) for step in finished.steps)
    counted = replace(
        ended.counted,
        num_uncaptured=max(0, sum(sums.verify_steps for sums in ended.counted.sums) - captured),
        num_missing_rows=finished.num_missing_rows,
    )
    _ = finished.sums  # here, because it takes long
    return replace(ended, finished=finished, counted=counted)


def _check_form(form: _Form, part: Rows | StepPart) -> None:
    """Note the form of a request's first rows. Raises ValueError if later ones have another: a trace holds them all."""
    for rows in (part.rows, part.rejected) if isinstance(part, StepPart) else (part,):
        if rows is None:
            continue
        teacher = rows.teacher
        found = {
            "aux": rows.aux,
            "ids": teacher.ids,
            "log_probs": teacher.log_probs,
            "log_sum_exp": teacher.log_sum_exp,
        }
        for name, tensor in found.items():
            if len(tensor) and form.setdefault(name, _form(tensor)) != _form(tensor):
                raise ValueError(f"{name} {_form(tensor)} after {form[name]} of the same request")


def _form(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape[1:]


def _build(builder: TraceBuilder, part: Rows | StepPart) -> None:
    if isinstance(part, StepPart):
        builder.add_step(part)
    else:
        builder.add_rows(part)


def _id(rid: str) -> str:
    """A short id of a request: ids are remembered, and clients may choose them."""
    return rid if len(rid) <= _ID_CHARS else hashlib.sha256(rid.encode("utf-8", "replace")).hexdigest()


def _ended(rid: str, header: Mapping[str, Any]) -> Ended:
    counted = CountedRequest(
        reason=_REASONS.get(str(header["finish"]), FinishReason.CANCELLED),
        num_prompt=count(header["prompt_tokens"]),
        num_output=count(header["output_tokens"]),
        sums=tuple(map(_sums, header["counters"])),
        duration_s=count(header["duration_us"]) / 1e6,
    )
    return Ended(trace_id=hashlib.sha256(rid.encode()).digest()[:16], counted=counted, terms=_terms(header))


def _terms(header: Mapping[str, Any]) -> CaptureTerms:
    return CaptureTerms(
        is_opted_out=header.get("permitted") is False,
        is_opted_in=header.get("opted_in") is True,
        is_unasked=header.get("asked") is False,
        may_train=header.get("train") is not False,
        is_constrained=bool(header.get("constrained")),
        domain=label(str(header.get("domain") or "")),
        tenant=str(header.get("tenant") or "")[:_DIGEST_CHARS],
        retention_s=count(header.get("retention_s", 0), limit=1 << 32),
        region=str(header.get("region") or "")[:_REGION_CHARS],
    )


def _sums(one: Mapping[str, Any]) -> CountedSteps:
    """A draft that the server does not know counts for no version."""
    accepted = tuple(map(count, one["accepted"]))
    steps = count(one["steps"])
    return CountedSteps(
        draft_version=count(one["version"] or 0, limit=1 << 32),
        verify_steps=steps,
        proposed=tuple(map(count, one["proposed_by_position"])),
        accepted=accepted,
        tokens=steps + sum(accepted),
        duration_s=count(one["us"]) / 1e6,
    )


def _finished(rid: str, header: Mapping[str, Any], tokens: Tensor, ended: Ended) -> FinishedRequest:
    counted = ended.counted
    if tokens.dim() != 1 or len(tokens) != counted.num_prompt + counted.num_output:
        raise ValueError(
            f"{tuple(tokens.shape)} tokens are not {counted.num_prompt} of a prompt and {counted.num_output}"
        )
    if tokens.is_floating_point():
        raise ValueError(f"tokens are {tokens.dtype}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= _MAX_UINT32:
        raise ValueError(f"a token is below 0 or above {_MAX_UINT32}")
    ids, sampling = tuple(tokens.tolist()), header["sampling"]
    request = GenerationRequest(
        request_id=rid,
        prompt_ids=ids[: counted.num_prompt],
        max_tokens=int(sampling["max_tokens"] or counted.num_output),
        sampling=SamplingParams(
            temperature=float(sampling["temperature"]),
            top_p=float(sampling["top_p"]),
            top_k=min(_MAX_UINT32, max(0, int(sampling["top_k"]))),
            min_p=float(sampling["min_p"]),
            repetition_penalty=float(sampling["repetition_penalty"]),
            presence_penalty=float(sampling["presence_penalty"]),
            frequency_penalty=float(sampling["frequency_penalty"]),
            seed=_seed(sampling["seed"]),
        ),
        json_schema="" if ended.terms.is_constrained else None,
    )
    return FinishedRequest(
        request=request,
        output_ids=ids[counted.num_prompt :],
        steps=(),
        reason=counted.reason,
        time_to_first_token_s=0.0,
        duration_s=counted.duration_s,
        num_cached=min(count(header.get("cached_tokens", 0)), counted.num_prompt),
    )


def _seed(value: Any) -> int | None:
    """A trace has room for those from 0 to 2^64."""
    return int(value) if value is not None and 0 <= int(value) < 1 << 64 else None


def _probability(header: Mapping[str, Any]) -> float:
    """With which a process chose a request that gives rows. Raises ValueError if it is none."""
    value = header["probability"]
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise ValueError(f"{value!r} is no probability")
    return float(value)

"""Builds the trace message of a finished request, or of a chunk of one. Pure; the tensor encoding is passed in."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from updraft.trace.v1 import trace_pb2
from updraft_draft import trace_bytes
from updraft_inference.agent.chunks import LIGHT_BYTES_PER_TOKEN, Chunk, RowBytes
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.engine import FinishedRequest, HiddenStates, Teacher, TopK, VerifyStep

if TYPE_CHECKING:
    import torch

SCHEMA = 1
"""Version of the message format; readers reject unknown versions."""

Encode = Callable[["torch.Tensor"], trace_pb2.Tensor]

_TOP_K_BYTES = 8
"""Bytes of an id and a log-probability."""

_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The source of traces, for which their samples are valid. The fields are those of `trace_pb2.Header`, and but for the
    last one those of `fleet_pb2.PodIdentity`."""

    speculator: str
    pod: str
    engine: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    quantization: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A finished request to be stored. `finished_s` is in Unix seconds."""

    finished: FinishedRequest
    plan: CapturePlan
    finished_s: float

    @property
    def num_bytes(self) -> int:
        """Approximate memory while queued."""
        hidden = self.finished.hidden
        payload = 0 if hidden is None else hidden.num_bytes
        tokens = len(self.finished.request.prompt_ids) + len(self.finished.output_ids)
        return payload + LIGHT_BYTES_PER_TOKEN * tokens


def row_bytes(finished: FinishedRequest, encode: Encode) -> RowBytes:
    """Encoded bytes of a row of a request's hidden states."""
    hidden = finished.hidden
    if hidden is None:
        return RowBytes(aux=0, teacher=0)
    if isinstance(hidden.teacher, TopK):
        teacher = _TOP_K_BYTES * (hidden.teacher.ids.shape[1] + 1)
    else:
        teacher = encode(hidden.teacher[:1]).ByteSize()
    return RowBytes(aux=encode(hidden.aux[:1]).ByteSize(), teacher=teacher)


def trace(ended: Ended, origin: Origin, encode: Encode, chunk: Chunk | None = None) -> trace_pb2.Trace:
    """The message of a request that has ended, or of one chunk of it."""
    message, aux = _message(ended, origin, encode, chunk or Chunk(finished=ended.finished))
    if aux:
        message.payload.aux_hidden.data = aux
    return message


def entry(ended: Ended, origin: Origin, encode: Encode, chunk: Chunk) -> bytes:
    """The same as bytes."""
    return trace_bytes.serialize(*_message(ended, origin, encode, chunk))


def _message(ended: Ended, origin: Origin, encode: Encode, chunk: Chunk) -> tuple[trace_pb2.Trace, bytes]:
    """The message without the data of its auxiliary hidden states, and that data."""
    finished, plan, request = chunk.finished, ended.plan, chunk.finished.request
    message = trace_pb2.Trace(
        header=trace_pb2.Header(
            schema=SCHEMA,
            trace_id=plan.trace_id,
            request_id=request.request_id,
            chunk=chunk.start,
            last_chunk=chunk.is_last,
            tenant_hash=plan.tenant,
            policy=trace_pb2.Policy(**asdict(plan.permissions)),
            **asdict(origin),
            sampling=_sampling(finished),
            cached_prefix_tokens=finished.num_cached,
            finish_reason=_reason(finished) if chunk.is_last else trace_pb2.FINISH_REASON_UNSPECIFIED,
            finished_unix_ms=int(ended.finished_s * 1000),
            time_to_first_token_us=_microseconds(finished.time_to_first_token_s),
            duration_us=_microseconds(finished.duration_s),
            evaluation=plan.is_evaluation,
            payload_probability=plan.payload_probability,
            domain=plan.domain,
        ),
        prompt_ids=request.prompt_ids,
        output_ids=finished.output_ids,
    )
    for step in finished.steps:  # in place: to copy thousands takes milliseconds, during which no other thread runs
        _add_step(message, step)
    aux = b"" if finished.hidden is None else _add_payload(message.payload, finished.hidden, encode)
    return message, aux


def _reason(finished: FinishedRequest) -> trace_pb2.FinishReason.ValueType:
    return trace_pb2.FinishReason.Value(f"FINISH_REASON_{finished.reason.name}")


def _sampling(finished: FinishedRequest) -> trace_pb2.Sampling:
    sampling = finished.request.sampling
    return trace_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        constrained=finished.request.json_schema is not None,
    )


def _add_step(message: trace_pb2.Trace, step: VerifyStep) -> None:
    message.steps.add(
        start=step.start,
        accepted=step.accepted,
        draft_ids=step.draft_ids,
        draft_log_probs=step.draft_log_probs,
        target_log_probs=step.target_log_probs,
        batch_size=step.batch_size,
        duration_us=_microseconds(step.duration_s),
        draft_version=step.draft_version,
        drafter=trace_pb2.Drafter.Value(f"DRAFTER_{step.drafter.name}"),
        looked_up=step.looked_up,
    )


def _add_payload(message: trace_pb2.Payload, hidden: HiddenStates, encode: Encode) -> bytes:
    """Fill it in place but for the data that it returns: a message that is assigned to another one is copied."""
    encoded = encode(hidden.aux[:])
    aux = encoded.data
    encoded.ClearField("data")
    message.first_position = hidden.first_position
    message.aux_hidden.CopyFrom(encoded)
    message.first_teacher_row = hidden.first_teacher_row
    message.missing_rows.extend(hidden.missing_rows)
    _add_teacher(message, hidden.teacher, encode)
    for rows in hidden.counterfactuals:
        counterfactual = message.counterfactuals.add(step=rows.step, aux_hidden=encode(rows.aux))
        _add_teacher(counterfactual, rows.teacher, encode)
    return aux


def _add_teacher(message: trace_pb2.Payload | trace_pb2.Counterfactual, teacher: Teacher, encode: Encode) -> None:
    if not isinstance(teacher, TopK):
        message.last_hidden.CopyFrom(encode(teacher))
        return
    arrays = trace_pb2.PackedTopK(
        k=teacher.ids.shape[1],
        ids=teacher.ids.numpy().astype("<u4").tobytes(),
        log_probs=teacher.log_probs.float().numpy().astype("<f4").tobytes(),
        log_sum_exp=teacher.log_sum_exp.float().numpy().astype("<f4").tobytes(),
    )
    message.top_k.ParseFromString(arrays.SerializeToString())


def _microseconds(seconds: float) -> int:
    return min(_MAX_UINT32, max(0, round(seconds * 1e6)))

"""Converts a trace to a sample: rows of hidden states, their tokens, and which tokens were corrections.

Traces that cannot be trained on are rejected here, with a label for the metric. If rows are missing, only the stretch without
gaps that has the most trainable tokens is used: joining stretches would train the draft on text that never existed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_artifacts.target_description import TargetDescription
from updraft_chassis.errors import InvalidInput
from updraft_chassis.tenants import hashes
from updraft_draft import trace_bytes
from updraft_draft.tensors import EncodedRows
from updraft_draft.trace_bytes import Data, ParsedTrace
from updraft_trainer.data.retention import CHUNK_MARK
from updraft_trainer.data.teacher import Teacher, read_teacher

SCHEMA = 1

FIRST_TRAINABLE = 2
"""Index of the first token that can be trained: the draft predicts it from row 0 and the token after row 0."""


class RefusedTrace(InvalidInput):
    """A trace that cannot be trained on. `label` is short and from a fixed set, for metrics."""

    def __init__(self, label: str, message: str) -> None:
        super().__init__(message)
        self.label = label


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTarget:
    """The model and tokenizer that traces must come from, and the region of this trainer."""

    target_fingerprint: str
    tokenizer_fingerprint: str
    aux_size: int
    hidden_size: int
    vocab_size: int
    region: str = ""

    @classmethod
    def of(
        cls, target: TargetDescription, *, target_fingerprint: str, tokenizer_fingerprint: str, region: str = ""
    ) -> "ExpectedTarget":
        return cls(
            target_fingerprint=target_fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
            aux_size=len(target.aux_layers) * target.hidden_size,
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            region=region,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """A rejected continuation: from `start` on (an index into the sample's ids) rejected draft tokens replace the text.

    Row n of the target has read the drafts up to ids[n]: ids int64 [N], aux [N, A], a teacher of N rows.
    """

    start: int
    ids: Tensor
    aux: EncodedRows
    teacher: Teacher

    @property
    def num_bytes(self) -> int:
        return self.ids.nbytes + self.aux.num_bytes + self.teacher.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Row r belongs to token ids[r]. aux [R, A] is encoded as it was sent; ids int64 [R + 1] has one more token.

    The teacher starts at row `first_teacher_row`; rows before it are context only. `first_output` indexes ids and is at least
    1. `corrections` bool [R + 1] marks tokens that replaced a rejected draft token of the draft model. `counterfactuals` are
    ordered by verify step, and present only if the pod captures them.
    """

    trace_id: str
    aux: EncodedRows
    teacher: Teacher
    first_teacher_row: int = 0
    ids: Tensor
    first_output: int
    corrections: Tensor
    is_evaluation: bool
    domain: str
    finished_unix_ms: int
    probability: float = 1.0
    """With which the request was captured."""
    tenant: int = 0
    """The keyed hash of its tenant; 0: none."""
    retention_s: int = 0
    """Age at which its tenant wants it deleted; 0: none."""
    counterfactuals: tuple[Counterfactual, ...] = ()

    @property
    def expires_ms(self) -> int:
        """When its tenant wants it deleted, in Unix milliseconds; 0: never."""
        return self.finished_unix_ms + 1000 * self.retention_s if self.retention_s else 0

    @property
    def tenant_text(self) -> str:
        """The hash in hexadecimal; empty for none."""
        return hashes.text(self.tenant)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.aux)

    @property
    def num_taught(self) -> int:
        """Output tokens with a prediction of the target. Those of the chunks of a request add up to its output."""
        return max(0, len(self.ids) - self._first_taught)

    @property
    def _first_taught(self) -> int:
        return max(self.first_output, self.first_teacher_row + 1, FIRST_TRAINABLE)

    def trainable(self, known: Tensor) -> tuple[Tensor, Teacher]:
        """Indices of trainable output tokens, int64 [N], and their teacher of N rows. `known` bool [vocab]: tokens that the
        draft can propose."""
        first = self._first_taught
        teacher = self.teacher.at(slice(first - 1 - self.first_teacher_row, None))
        is_trainable = known[self.ids[first:]] & teacher.is_trainable(known)
        return torch.nonzero(is_trainable)[:, 0] + first, teacher.at(is_trainable)

    @property
    def num_bytes(self) -> int:
        text = self.aux.num_bytes + self.teacher.num_bytes + self.ids.nbytes + self.corrections.nbytes
        return text + sum(branch.num_bytes for branch in self.counterfactuals)


def checked(samples: Iterable[Sample], check: Callable[[], None]) -> Iterator[Sample]:
    """The samples, with a call of `check` before each, which may end long work on them by an exception."""
    for sample in samples:
        check()
        yield sample


def read_sample(data: Data, expected: ExpectedTarget, *, is_checked: bool = False) -> Sample:
    """Parse and check one stream entry; see `sample_of`. Raises RefusedTrace."""
    return sample_of(parse(data), expected, is_checked=is_checked)


def parse(data: Data) -> ParsedTrace:
    """The message, unchecked. Raises RefusedTrace if it is none."""
    try:
        return trace_bytes.parse(data)
    except DecodeError as error:
        raise RefusedTrace("malformed", f"not a trace: {error}") from None


def sample_of(parsed: ParsedTrace, expected: ExpectedTarget, *, is_checked: bool = False) -> Sample:
    """Check a trace. Raises RefusedTrace. `is_checked`: its values have passed the check before."""
    trace = parsed.trace
    _check_header(trace.header, expected)
    if not trace.HasField("payload"):
        raise RefusedTrace("no_payload", "the trace carries no hidden states")
    if not 0.0 < trace.header.payload_probability <= 1.0:
        probability = trace.header.payload_probability
        raise RefusedTrace("malformed", f"the payload was taken with the probability {probability}")
    return _sample(parsed, expected, is_checked=is_checked)


def _check_header(header: trace_pb2.Header, expected: ExpectedTarget) -> None:
    if header.schema != SCHEMA:
        raise RefusedTrace("schema", f"the trace has schema {header.schema}, this trainer reads {SCHEMA}")
    if len(header.trace_id) != 16:
        raise RefusedTrace("malformed", f"the trace id has {len(header.trace_id)} bytes, not 16")
    if header.target_fingerprint != expected.target_fingerprint:
        raise RefusedTrace("other_target", f"the trace is of the target {header.target_fingerprint}")
    if header.tokenizer_fingerprint != expected.tokenizer_fingerprint:
        raise RefusedTrace("other_target", f"the trace is of the tokenizer {header.tokenizer_fingerprint}")
    _check_permission(header, expected.region)


def _check_permission(header: trace_pb2.Header, region: str) -> None:
    policy = header.policy
    if not policy.train and not header.evaluation:
        raise RefusedTrace("not_allowed", "the trace's policy permits evaluation only, and it is not held out")
    if not policy.retain:
        raise RefusedTrace("not_allowed", "the trace's policy does not permit storing it")
    if policy.region not in ("", region):
        where = f"this trainer is in {region!r}" if region else "this trainer has no region"
        raise RefusedTrace("other_region", f"the trace may be stored in {policy.region[:63]!r} only; {where}")
    if header.sampling.constrained:
        raise RefusedTrace("constrained", "the trace's tokens were masked by a grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """The payload's rows as sent, including gaps. `first_output` is relative to the first row and may be negative."""

    ids: Tensor
    aux: EncodedRows
    teacher: Teacher
    first_teacher_row: int
    first_output: int

    @property
    def num_rows(self) -> int:
        """Rows with a next token."""
        return len(self.ids) - 1

    def num_trainable(self, stretch: range) -> int:
        """Trainable tokens if only these rows are used."""
        first = max(self.first_output, self.first_teacher_row + 1, stretch.start + FIRST_TRAINABLE)
        return max(0, stretch.stop - first + 1)


def _sample(parsed: ParsedTrace, expected: ExpectedTarget, *, is_checked: bool) -> Sample:
    trace, block = parsed.trace, _block(parsed, expected)
    stretch = _stretch(block, trace.payload.missing_rows)
    aux, ids = block.aux[stretch.start : stretch.stop], block.ids[stretch.start : stretch.stop + 1]
    first = max(stretch.start, block.first_teacher_row)
    teacher = block.teacher.at(slice(first - block.first_teacher_row, stretch.stop - block.first_teacher_row))
    if not is_checked and (problem := _problem(aux, teacher, ids, expected)):
        raise RefusedTrace("malformed", problem)
    corrections = torch.zeros(len(ids), dtype=torch.bool)
    corrected = (
        block.first_output + step.start + step.accepted - stretch.start for step in trace.steps if _rejects_model(step)
    )
    corrections[[index for index in corrected if 0 < index < len(ids)]] = True
    return Sample(
        trace_id=_sample_id(trace.header),
        aux=aux,
        teacher=teacher,
        first_teacher_row=first - stretch.start,
        ids=ids,
        first_output=max(1, block.first_output - stretch.start),
        corrections=corrections,
        is_evaluation=trace.header.evaluation,
        domain=trace.header.domain,
        finished_unix_ms=trace.header.finished_unix_ms,
        probability=trace.header.payload_probability,
        tenant=trace.header.tenant_hash,
        retention_s=trace.header.policy.retention_seconds,
        counterfactuals=_counterfactuals(trace, block, stretch, expected),
    )


def _sample_id(header: trace_pb2.Header) -> str:
    """The trace id. Later chunks of a request are samples of their own, with their name in it."""
    return header.trace_id.hex() + (f"{CHUNK_MARK}{header.chunk}" if header.chunk else "")


def _rejects_model(step: trace_pb2.Step) -> bool:
    """The draft token that was rejected is the draft model's, not one that n-gram lookup proposed."""
    is_rejected = step.accepted < len(step.draft_ids)
    return is_rejected and step.drafter != trace_pb2.DRAFTER_NGRAM and step.accepted not in step.looked_up


def _block(parsed: ParsedTrace, expected: ExpectedTarget) -> _Block:
    trace, payload = parsed.trace, parsed.trace.payload
    aux, teacher = _rows(payload, parsed.aux, expected)
    if len(teacher) != len(aux) - payload.first_teacher_row:
        rows = f"{len(teacher)} rows from row {payload.first_teacher_row} on"
        raise RefusedTrace("malformed", f"a teacher of {rows} does not match {len(aux)} rows of hidden states")
    all_ids = [*trace.prompt_ids, *trace.output_ids]
    num_rows = min(len(aux), len(all_ids) - payload.first_position - 1)
    if num_rows < 1:
        raise RefusedTrace("malformed", f"{num_rows} rows from position {payload.first_position} on are too few")
    return _Block(
        ids=torch.tensor(all_ids[payload.first_position : payload.first_position + num_rows + 1], dtype=torch.int64),
        aux=aux,
        teacher=teacher,
        first_teacher_row=payload.first_teacher_row,
        first_output=len(trace.prompt_ids) - payload.first_position,
    )


def _stretch(block: _Block, missing: Sequence[int]) -> range:
    """The rows between two gaps that have the most trainable tokens; the later ones if equal."""
    edges = [-1, *missing]
    if any(edge >= following for edge, following in pairwise([*edges, len(block.aux)])):
        raise RefusedTrace("malformed", f"missing rows do not ascend within the {len(block.aux)} rows")
    edges = [*(edge for edge in edges if edge < block.num_rows), block.num_rows]
    stretches = [range(edge + 1, following) for edge, following in pairwise(edges)]
    best = max(reversed(stretches), key=block.num_trainable)
    if block.num_trainable(best) == 0:
        gaps = f" between {len(missing)} missing ones" if missing else ""
        raise RefusedTrace("too_few_rows", f"{block.num_rows} rows{gaps} have no trainable token")
    return best


def _counterfactuals(
    trace: trace_pb2.Trace, block: _Block, stretch: range, expected: ExpectedTarget
) -> tuple[Counterfactual, ...]:
    """Counterfactuals after rows of the stretch, at most one per verify step."""
    counterfactuals, previous = [], -1
    for message in trace.payload.counterfactuals:
        if not previous < message.step < len(trace.steps):
            order = f"step {message.step} of {len(trace.steps)}, after step {previous}"
            raise RefusedTrace("malformed", f"a counterfactual of {order}")
        previous = message.step
        step = trace.steps[message.step]
        aux, teacher = _rows(message, message.aux_hidden.data, expected)
        rejected = step.draft_ids[step.accepted :]
        start = block.first_output + step.start + step.accepted
        if not 0 < len(aux) <= len(rejected) or start > block.num_rows:
            rows = f"{len(aux)} counterfactual rows at {start} of {block.num_rows}"
            raise RefusedTrace("malformed", f"{rows} where {len(rejected)} drafts were rejected")
        ids = torch.tensor(rejected[: len(aux)], dtype=torch.int64)
        problem = "" if len(teacher) == len(aux) else f"a teacher of {len(teacher)} rows for {len(aux)}"
        if problem := problem or _problem(aux, teacher, ids, expected):
            raise RefusedTrace("malformed", f"counterfactual of step {message.step}: {problem}")
        if stretch.start < start <= stretch.stop:
            counterfactuals.append(Counterfactual(start=start - stretch.start, ids=ids, aux=aux, teacher=teacher))
    return tuple(counterfactuals)


def _rows(
    message: trace_pb2.Payload | trace_pb2.Counterfactual, data: Data, expected: ExpectedTarget
) -> tuple[EncodedRows, Teacher]:
    try:
        aux = EncodedRows.read(message.aux_hidden, data)
        teacher = read_teacher(message, vocab_size=expected.vocab_size)
    except InvalidInput as error:
        raise RefusedTrace("malformed", str(error)) from None
    if teacher is None:
        raise RefusedTrace("no_teacher", "the trace has hidden states but no predictions of the target")
    return aux, teacher


def _problem(aux: EncodedRows, teacher: Teacher, ids: Tensor, expected: ExpectedTarget) -> str:
    """The first problem with the values, or an empty string."""
    if aux.num_columns != expected.aux_size:
        return f"auxiliary hidden states of width {aux.num_columns}, expected {expected.aux_size}"
    if not aux.is_finite():
        return "auxiliary hidden states are not finite"
    if bool(((ids < 0) | (ids >= expected.vocab_size)).any()):
        return f"a token is outside the vocabulary of {expected.vocab_size}"
    return teacher.problem(hidden_size=expected.hidden_size, vocab_size=expected.vocab_size)

"""A trace as the learner sees it: rows of hidden states, the tokens around them, and which of them were corrections.

Whatever cannot be learnt from is refused here, with a reason that becomes a metric's label.
"""

from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput
from updraft_draft.tensors import decode

SCHEMA = 1


class Refusal(InvalidInput):
    """A trace that is not learnt from. `label` is short and from a fixed set, for metrics."""

    def __init__(self, label: str, sentence: str) -> None:
        super().__init__(sentence)
        self.label = label


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What the hidden states must come from."""

    target_fingerprint: str
    tokenizer_fingerprint: str
    aux_size: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """Text that might have been: from `place` on (an index into the sample's ids) it goes on with rejected drafts.

    Row n of the target has read the drafts up to ids[n]: ids int64 [N], aux [N, A], last [N, D].
    """

    place: int
    ids: Tensor
    aux: Tensor
    last: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return self.ids.nbytes + self.aux.nbytes + self.last.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Rows r of the target for tokens ids[r]: aux [R, A] and last [R, D], bfloat16; ids int64 [R + 1] has one token more.

    `first_output` indexes ids; `corrections` bool [R + 1] marks tokens that replaced a rejected draft. `counterfactuals`
    are in order of their verify steps, and only there when the pod was asked for them.
    """

    trace_id: str
    aux: Tensor
    last: Tensor
    ids: Tensor
    first_output: int
    corrections: Tensor
    is_evaluation: bool
    domain: str
    finished_unix_ms: int
    counterfactuals: tuple[Counterfactual, ...] = ()

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.aux)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        text = self.aux.nbytes + self.last.nbytes + self.ids.nbytes + self.corrections.nbytes
        return text + sum(one.num_bytes for one in self.counterfactuals)


def read_sample(data: bytes, expected: Expectation) -> Sample:
    """Parse and check one stream entry. Raises Refusal."""
    trace = trace_pb2.Trace()
    try:
        trace.ParseFromString(data)
    except DecodeError as error:
        raise Refusal("malformed", f"not a trace: {error}") from None
    _check_header(trace.header, expected)
    if not trace.HasField("payload"):
        raise Refusal("no_payload", "the trace carries no hidden states")
    if trace.payload.missing_rows:
        raise Refusal("unsupported", "the trace's hidden states are not one whole block")
    return _sample(trace, expected)


def _check_header(header: trace_pb2.Header, expected: Expectation) -> None:
    if header.schema != SCHEMA:
        raise Refusal("schema", f"the trace has schema {header.schema}, this trainer reads {SCHEMA}")
    if len(header.trace_id) != 16:
        raise Refusal("malformed", f"the trace id has {len(header.trace_id)} bytes, not 16")
    if header.target_fingerprint != expected.target_fingerprint:
        raise Refusal("other_target", f"the trace is of the target {header.target_fingerprint}")
    if header.tokenizer_fingerprint != expected.tokenizer_fingerprint:
        raise Refusal("other_target", f"the trace is of the tokenizer {header.tokenizer_fingerprint}")
    if not header.policy.train:
        raise Refusal("not_allowed", "the trace's policy does not permit training")
    if header.sampling.constrained:
        raise Refusal("constrained", "the trace's tokens were masked by a grammar")


def _sample(trace: trace_pb2.Trace, expected: Expectation) -> Sample:
    payload, num_prompt = trace.payload, len(trace.prompt_ids)
    aux, last = _hidden(payload)
    everything = [*trace.prompt_ids, *trace.output_ids]
    rows = min(len(aux), len(everything) - payload.first_position - 1)
    ids = torch.tensor(everything[payload.first_position : payload.first_position + rows + 1], dtype=torch.int64)
    first_output = num_prompt - payload.first_position
    problem = _problem(aux, last, ids, expected)
    if problem or rows < 2 or first_output < 1:
        raise Refusal("malformed", problem or f"{rows} rows from position {payload.first_position} are too few")
    corrections = torch.zeros(rows + 1, dtype=torch.bool)
    for step in trace.steps:
        place = first_output + step.start + step.accepted
        if step.accepted < len(step.draft_ids) and place <= rows:
            corrections[place] = True
    return Sample(
        trace_id=trace.header.trace_id.hex(),
        aux=aux[:rows],
        last=last[:rows],
        ids=ids,
        first_output=first_output,
        corrections=corrections,
        is_evaluation=trace.header.evaluation,
        domain=trace.header.domain,
        finished_unix_ms=trace.header.finished_unix_ms,
        counterfactuals=_counterfactuals(trace, first_output, rows, expected),
    )


def _counterfactuals(
    trace: trace_pb2.Trace, first_output: int, rows: int, expected: Expectation
) -> tuple[Counterfactual, ...]:
    """Those of a text of `rows` rows, at most one a verify step."""
    found, previous = [], -1
    for message in trace.payload.counterfactuals:
        if not previous < message.step < len(trace.steps):
            raise Refusal(
                "malformed", f"a counterfactual of step {message.step} of {len(trace.steps)}, after {previous}"
            )
        previous = message.step
        step = trace.steps[message.step]
        aux, last = _hidden(message)
        rejected = step.draft_ids[step.accepted :]
        place = first_output + step.start + step.accepted
        if not 0 < len(aux) <= len(rejected) or place > rows:
            what = f"{len(aux)} counterfactual rows at {place} of {rows}"
            raise Refusal("malformed", f"{what} where {len(rejected)} drafts were rejected")
        ids = torch.tensor(rejected[: len(aux)], dtype=torch.int64)
        if problem := _problem(aux, last, ids, expected):
            raise Refusal("malformed", f"counterfactual of step {message.step}: {problem}")
        found.append(Counterfactual(place=place, ids=ids, aux=aux, last=last))
    return tuple(found)


def _hidden(message: trace_pb2.Payload | trace_pb2.Counterfactual) -> tuple[Tensor, Tensor]:
    """Auxiliary and last hidden states."""
    if message.WhichOneof("teacher") != "last_hidden":
        raise Refusal("unsupported", "the trace's teacher is not the last hidden state")
    try:
        return decode(message.aux_hidden), decode(message.last_hidden)
    except InvalidInput as error:
        raise Refusal("malformed", str(error)) from None


def _problem(aux: Tensor, last: Tensor, ids: Tensor, expected: Expectation) -> str:
    """The first thing wrong with the tensors; empty if nothing is."""
    if aux.shape[1] != expected.aux_size or last.shape[1] != expected.hidden_size or len(aux) != len(last):
        return f"hidden states of shapes {tuple(aux.shape)} and {tuple(last.shape)} do not belong to this target"
    if not bool(torch.isfinite(aux).all()) or not bool(torch.isfinite(last).all()):
        return "hidden states are not finite"
    if bool(((ids < 0) | (ids >= expected.vocab_size)).any()):
        return f"a token is outside the vocabulary of {expected.vocab_size}"
    return ""

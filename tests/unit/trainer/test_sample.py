"""What cannot be learnt from is refused with a label and a sentence."""

from collections.abc import Callable

import pytest
import torch
from tests.support.tiny_target import HIDDEN, make_tiny_target
from tests.support.traces import TraceMaker

from updraft.trace.v1 import trace_pb2
from updraft_draft.tensors import decode, encode
from updraft_trainer.sample import Refusal, read_sample


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> TraceMaker:
    return TraceMaker(make_tiny_target(tmp_path_factory.mktemp("models") / "target"))


def test_rows_and_tokens_line_up(maker: TraceMaker) -> None:
    trace = maker.trace(1, num_prompt=4, num_output=10)
    sample = read_sample(trace.SerializeToString(), maker.expected)
    assert sample.num_rows == 13, "the last output token was never forwarded"
    assert sample.ids.tolist() == [*trace.prompt_ids, *trace.output_ids]
    assert sample.first_output == 4
    # Every draft of the maker is refused, so every token after the first output is a correction.
    assert sample.corrections.tolist() == [False] * 5 + [True] * 9


def test_rows_after_a_rejection_stand_where_the_rejected_draft_did(maker: TraceMaker) -> None:
    trace = maker.trace(1, num_prompt=4, num_output=10, counterfactual_rows=2)
    sample = read_sample(trace.SerializeToString(), maker.expected)
    assert [one.place for one in sample.counterfactuals] == list(range(5, 14))
    for one, step in zip(sample.counterfactuals, trace.steps, strict=True):
        assert one.ids.tolist() == list(step.draft_ids)
        assert one.ids[0] != sample.ids[one.place], "the correction stands in the text"
        assert len(one.aux) == len(one.last) == 2
    (second, message) = (sample.counterfactuals[1], trace.payload.counterfactuals[1])
    assert torch.equal(second.aux, decode(message.aux_hidden))
    assert torch.equal(second.last, decode(message.last_hidden))


def test_rows_after_rejections_count_towards_the_bytes_of_a_sample(maker: TraceMaker) -> None:
    without, with_them = (
        read_sample(maker.data(1, num_output=10, counterfactual_rows=rows), maker.expected) for rows in (0, 2)
    )
    row = (maker.expected.aux_size + maker.expected.hidden_size) * 2 + 8
    assert with_them.num_bytes - without.num_bytes == 9 * 2 * row


def _schema(trace: trace_pb2.Trace) -> None:
    trace.header.schema = 99


def _target(trace: trace_pb2.Trace) -> None:
    trace.header.target_fingerprint = "sha256:other"


def _policy(trace: trace_pb2.Trace) -> None:
    trace.header.policy.train = False


def _payload(trace: trace_pb2.Trace) -> None:
    trace.ClearField("payload")


def _grammar(trace: trace_pb2.Trace) -> None:
    trace.header.sampling.constrained = True


def _token(trace: trace_pb2.Trace) -> None:
    trace.output_ids[3] = 2**31


def _cut(trace: trace_pb2.Trace) -> None:
    trace.payload.aux_hidden.data = trace.payload.aux_hidden.data[:-2]


def _narrow(trace: trace_pb2.Trace) -> None:
    trace.payload.last_hidden.columns //= 2
    trace.payload.last_hidden.rows *= 2


def _id(trace: trace_pb2.Trace) -> None:
    trace.header.trace_id = b"short"


def _no_step(trace: trace_pb2.Trace) -> None:
    trace.payload.counterfactuals[-1].step = len(trace.steps)


def _same_step(trace: trace_pb2.Trace) -> None:
    trace.payload.counterfactuals[1].step = 0


def _more_rows(trace: trace_pb2.Trace) -> None:
    del trace.steps[2].draft_ids[1:]


def _all_accepted(trace: trace_pb2.Trace) -> None:
    trace.steps[2].accepted = 2


def _no_rows(trace: trace_pb2.Trace) -> None:
    for tensor in (trace.payload.counterfactuals[2].aux_hidden, trace.payload.counterfactuals[2].last_hidden):
        tensor.rows, tensor.data = 0, b""


def _beyond(trace: trace_pb2.Trace) -> None:
    trace.steps[2].start = 40


def _narrow_aside(trace: trace_pb2.Trace) -> None:
    rejected = trace.payload.counterfactuals[2]
    rejected.aux_hidden.CopyFrom(rejected.last_hidden)


def _uneven(trace: trace_pb2.Trace) -> None:
    rejected, whole = trace.payload.counterfactuals[2].last_hidden, trace.payload.last_hidden
    rejected.CopyFrom(encode(decode(whole)[:1], trace_pb2.TENSOR_ENCODING_BF16))


def _infinite(trace: trace_pb2.Trace) -> None:
    values = torch.full((2, HIDDEN), float("inf"))
    trace.payload.counterfactuals[2].last_hidden.CopyFrom(encode(values, trace_pb2.TENSOR_ENCODING_BF16))


def _unknown_draft(trace: trace_pb2.Trace) -> None:
    trace.steps[2].draft_ids[1] = 2**31


def _other_teacher(trace: trace_pb2.Trace) -> None:
    trace.payload.counterfactuals[2].top_k.k = 4


@pytest.mark.parametrize(
    ("damage", "label"),
    [
        pytest.param(_no_step, "malformed", id="of no step"),
        pytest.param(_same_step, "malformed", id="twice of a step"),
        pytest.param(_more_rows, "malformed", id="more rows than rejected drafts"),
        pytest.param(_all_accepted, "malformed", id="of a step that rejected nothing"),
        pytest.param(_no_rows, "malformed", id="no rows"),
        pytest.param(_beyond, "malformed", id="beyond the text"),
        pytest.param(_narrow_aside, "malformed", id="tensor of another width"),
        pytest.param(_uneven, "malformed", id="tensors of unequal rows"),
        pytest.param(_infinite, "malformed", id="not finite"),
        pytest.param(_unknown_draft, "malformed", id="draft outside the vocabulary"),
        pytest.param(_other_teacher, "unsupported", id="top-k teacher"),
    ],
)
def test_rows_after_a_rejection_that_cannot_be_right_refuse_the_trace(
    maker: TraceMaker, damage: Callable[[trace_pb2.Trace], None], label: str
) -> None:
    trace = maker.trace(2, counterfactual_rows=2)
    damage(trace)
    with pytest.raises(Refusal, match=" ") as refused:
        read_sample(trace.SerializeToString(), maker.expected)
    assert refused.value.label == label


@pytest.mark.parametrize(
    ("damage", "label"),
    [
        pytest.param(_schema, "schema", id="another schema"),
        pytest.param(_target, "other_target", id="another target"),
        pytest.param(_policy, "not_allowed", id="training not allowed"),
        pytest.param(_payload, "no_payload", id="light record"),
        pytest.param(_grammar, "constrained", id="masked by a grammar"),
        pytest.param(_token, "malformed", id="token outside the vocabulary"),
        pytest.param(_cut, "malformed", id="tensor cut short"),
        pytest.param(_narrow, "malformed", id="tensor of another width"),
        pytest.param(_id, "malformed", id="no trace id"),
    ],
)
def test_a_trace_that_must_not_teach_is_refused(
    maker: TraceMaker, damage: Callable[[trace_pb2.Trace], None], label: str
) -> None:
    trace = maker.trace(2)
    damage(trace)
    with pytest.raises(Refusal) as refused:
        read_sample(trace.SerializeToString(), maker.expected)
    assert refused.value.label == label
    assert " " in str(refused.value)


def test_bytes_that_are_no_trace_are_malformed(maker: TraceMaker) -> None:
    with pytest.raises(Refusal) as refused:
        read_sample(b"\xff\xff\xff", maker.expected)
    assert refused.value.label == "malformed"

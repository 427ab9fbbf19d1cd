"""What cannot be learnt from is refused with a label and a sentence."""

from collections.abc import Callable

import pytest
from tests.support.tiny_target import make_tiny_target
from tests.support.traces import TraceMaker

from updraft.trace.v1 import trace_pb2
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

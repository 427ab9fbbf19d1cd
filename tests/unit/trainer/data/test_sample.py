"""What cannot be learnt from is refused with a label and a sentence."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.support.likeliest import show_likeliest
from tests.support.tiny_target import HIDDEN, VOCAB, make_tiny_target
from tests.support.traces import TraceMaker, rows_first
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_draft.target_weights import read_head
from updraft_draft.tensors import decode, encode
from updraft_trainer.data.sample import RefusedTrace, read_sample
from updraft_trainer.data.teacher import LastHidden, TopK


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


def test_a_token_that_replaced_a_lookup_corrects_no_draft(maker: TraceMaker) -> None:
    trace = maker.trace(1, num_prompt=4, num_output=10)
    trace.steps[1].drafter = trace_pb2.DRAFTER_NGRAM
    for step, looked_up in zip(trace.steps[2:4], ([0], [1]), strict=True):
        step.drafter = trace_pb2.DRAFTER_HYBRID
        step.looked_up[:] = looked_up
    sample = read_sample(trace.SerializeToString(), maker.expected)
    assert sample.corrections.tolist() == [*[False] * 5, True, False, False, *[True] * 6]


def test_rows_after_a_rejection_stand_where_the_rejected_draft_did(maker: TraceMaker) -> None:
    trace = maker.trace(1, num_prompt=4, num_output=10, counterfactual_rows=2)
    sample = read_sample(trace.SerializeToString(), maker.expected)
    assert [one.start for one in sample.counterfactuals] == list(range(5, 14))
    for one, step in zip(sample.counterfactuals, trace.steps, strict=True):
        assert one.ids.tolist() == list(step.draft_ids)
        assert one.ids[0] != sample.ids[one.start], "the correction stands in the text"
        assert len(one.aux) == len(one.teacher) == 2
    (second, message) = (sample.counterfactuals[1], trace.payload.counterfactuals[1])
    assert torch.equal(second.aux.decoded(), decode(message.aux_hidden))
    assert isinstance(second.teacher, LastHidden)
    assert torch.equal(second.teacher.states, decode(message.last_hidden))


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


def _tokenizer(trace: trace_pb2.Trace) -> None:
    trace.header.tokenizer_fingerprint = "sha256:other"


def _policy(trace: trace_pb2.Trace) -> None:
    trace.header.policy.train = False


def _retain(trace: trace_pb2.Trace) -> None:
    trace.header.policy.retain = False


def _region(trace: trace_pb2.Trace) -> None:
    trace.header.policy.region = "eu"


def _probability(trace: trace_pb2.Trace) -> None:
    trace.header.payload_probability = 0.0


def _no_number(trace: trace_pb2.Trace) -> None:
    trace.header.payload_probability = float("nan")


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


def _no_teacher_aside(trace: trace_pb2.Trace) -> None:
    trace.payload.counterfactuals[2].ClearField("teacher")


def _empty_teacher_aside(trace: trace_pb2.Trace) -> None:
    trace.payload.counterfactuals[2].top_k.k = 4


@pytest.mark.parametrize(
    ("damage", "label"),
    [
        pytest.param(_no_step, "malformed", id="of no step"),
        pytest.param(_same_step, "malformed", id="twice of a step"),
        pytest.param(_more_rows, "malformed", id="more rows than rejected draft tokens"),
        pytest.param(_all_accepted, "malformed", id="of a step that rejected nothing"),
        pytest.param(_no_rows, "malformed", id="no rows"),
        pytest.param(_beyond, "malformed", id="beyond the text"),
        pytest.param(_narrow_aside, "malformed", id="tensor of another width"),
        pytest.param(_uneven, "malformed", id="tensors of unequal rows"),
        pytest.param(_infinite, "malformed", id="not finite"),
        pytest.param(_unknown_draft, "malformed", id="draft outside the vocabulary"),
        pytest.param(_no_teacher_aside, "no_teacher", id="nothing of what the target predicted"),
        pytest.param(_empty_teacher_aside, "malformed", id="top-k teacher without a row"),
    ],
)
def test_rows_after_a_rejection_that_cannot_be_right_refuse_the_trace(
    maker: TraceMaker, damage: Callable[[trace_pb2.Trace], None], label: str
) -> None:
    trace = maker.trace(2, counterfactual_rows=2)
    damage(trace)
    with pytest.raises(RefusedTrace, match=" ") as refused:
        read_sample(trace.SerializeToString(), maker.expected)
    assert refused.value.label == label


@pytest.mark.attack(
    boundary="traces",
    attack="traces without permission, of another region or target, or cut short",
    outcome="refused",
)
@pytest.mark.parametrize(
    ("damage", "label"),
    [
        pytest.param(_schema, "schema", id="another schema"),
        pytest.param(_target, "other_target", id="another target"),
        pytest.param(_tokenizer, "other_target", id="another tokenizer"),
        pytest.param(_policy, "not_allowed", id="training not allowed"),
        pytest.param(_retain, "not_allowed", id="storing not allowed"),
        pytest.param(_region, "other_region", id="another region"),
        pytest.param(_probability, "malformed", id="captured with probability 0"),
        pytest.param(_no_number, "malformed", id="captured with no probability"),
        pytest.param(_payload, "no_payload", id="light record"),
        pytest.param(_grammar, "constrained", id="masked by a grammar"),
        pytest.param(_token, "malformed", id="token outside the vocabulary"),
        pytest.param(_cut, "malformed", id="tensor cut short"),
        pytest.param(_narrow, "malformed", id="tensor of another width"),
        pytest.param(_id, "malformed", id="no trace id"),
    ],
)
@pytest.mark.parametrize("write", [rows_first, trace_pb2.Trace.SerializeToString])
def test_a_trace_that_must_not_teach_is_refused(
    maker: TraceMaker,
    damage: Callable[[trace_pb2.Trace], None],
    label: str,
    write: Callable[[trace_pb2.Trace], bytes],
) -> None:
    trace = maker.trace(2)
    damage(trace)
    with pytest.raises(RefusedTrace) as refused:
        read_sample(write(trace), maker.expected)
    assert refused.value.label == label
    assert " " in str(refused.value)


def test_rows_that_come_first_are_those_of_the_usual_order(maker: TraceMaker) -> None:
    trace = maker.trace(2)
    sample, usual = (read_sample(data, maker.expected) for data in (rows_first(trace), trace.SerializeToString()))
    assert torch.equal(sample.aux.decoded(), usual.aux.decoded())
    assert torch.equal(sample.ids, usual.ids)
    assert isinstance(sample.teacher, LastHidden)
    assert isinstance(usual.teacher, LastHidden)
    assert torch.equal(sample.teacher.states, usual.teacher.states)


def test_bytes_that_are_no_trace_are_malformed(maker: TraceMaker) -> None:
    with pytest.raises(RefusedTrace) as refused:
        read_sample(b"\xff\xff\xff", maker.expected)
    assert refused.value.label == "malformed"


@pytest.fixture(scope="module")
def head(maker: TraceMaker, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return read_head(make_tiny_target(tmp_path_factory.mktemp("models") / "target")).head


def test_the_likeliest_tokens_belong_to_the_rows_from_the_prompts_last_one_on(maker: TraceMaker, head: Tensor) -> None:
    trace = show_likeliest(maker.trace(1, num_prompt=4, num_output=10, counterfactual_rows=2), head, k=5)
    sample = read_sample(trace.SerializeToString(), maker.expected)
    assert isinstance(sample.teacher, TopK)
    assert (sample.num_rows, sample.first_output, sample.first_teacher_row, len(sample.teacher)) == (13, 4, 3, 10)
    known = torch.ones(VOCAB, dtype=torch.bool)
    tokens, teacher = sample.trainable(known)
    assert tokens.tolist() == list(range(4, 14))
    assert isinstance(teacher, TopK)
    assert teacher.ids[:, 0].tolist() == sample.ids[tokens].tolist(), "the teacher of a token is the row before it"
    assert teacher.log_probs.flatten().tolist() == list(trace.payload.top_k.log_probs)
    assert all(isinstance(one.teacher, TopK) for one in sample.counterfactuals)
    assert sample.num_bytes > sum(one.num_bytes for one in sample.counterfactuals) + teacher.num_bytes


def test_rows_without_a_teacher_are_context_and_are_not_trained(maker: TraceMaker, head: Tensor) -> None:
    trace = show_likeliest(maker.trace(1, num_prompt=4, num_output=10), head, k=5)
    trace.payload.first_teacher_row += 4
    for field in (trace.payload.top_k.ids, trace.payload.top_k.log_probs):
        del field[: 4 * 5]
    del trace.payload.top_k.log_sum_exp[:4]
    sample = read_sample(trace.SerializeToString(), maker.expected)
    assert (sample.num_rows, sample.first_output) == (13, 4), "an estimate needs no teacher"
    tokens, teacher = sample.trainable(torch.ones(VOCAB, dtype=torch.bool))
    assert tokens.tolist() == list(range(8, 14))
    assert isinstance(teacher, TopK)
    assert teacher.ids[:, 0].tolist() == sample.ids[tokens].tolist()


def test_a_row_none_of_whose_likeliest_tokens_the_draft_can_propose_is_not_trained(
    maker: TraceMaker, head: Tensor
) -> None:
    trace = show_likeliest(maker.trace(1, num_prompt=4, num_output=10), head, k=1)
    trace.payload.top_k.ids[2] = 400  # of the third output token, which was drawn from the tail then
    sample = read_sample(trace.SerializeToString(), maker.expected)
    known = torch.arange(VOCAB) < 256
    tokens, teacher = sample.trainable(known)
    assert tokens.tolist() == [4, 5, *range(7, 14)]
    assert len(teacher) == 9


def _missing(trace: trace_pb2.Trace, *rows: int) -> trace_pb2.Trace:
    """Rows that do not exist hold what nobody may read."""
    trace.payload.missing_rows.extend(rows)
    aux, last = decode(trace.payload.aux_hidden), decode(trace.payload.last_hidden)
    for row in rows:
        aux[row] = last[row] = float("nan")
    trace.payload.aux_hidden.CopyFrom(encode(aux, trace_pb2.TENSOR_ENCODING_BF16))
    trace.payload.last_hidden.CopyFrom(encode(last, trace_pb2.TENSOR_ENCODING_BF16))
    return trace


@pytest.mark.parametrize(
    ("rows", "first", "last", "first_output"),
    [
        pytest.param([0, 1], 2, 12, 2, id="a cached prefix"),
        pytest.param([12], 0, 11, 4, id="the last row"),
        pytest.param([6], 7, 12, 1, id="the later half has more trainable tokens"),
        pytest.param([10], 0, 9, 4, id="the earlier part has more"),
        pytest.param([1, 7, 8], 2, 6, 2, id="between two gaps"),
    ],
)
def test_of_a_trace_with_gaps_the_stretch_with_the_most_trainable_tokens_is_used(
    maker: TraceMaker, rows: list[int], first: int, last: int, first_output: int
) -> None:
    whole = read_sample(
        maker.trace(1, num_prompt=4, num_output=10, counterfactual_rows=2).SerializeToString(), maker.expected
    )
    trace = _missing(maker.trace(1, num_prompt=4, num_output=10, counterfactual_rows=2), *rows)
    sample = read_sample(trace.SerializeToString(), maker.expected)
    assert sample.first_output == first_output
    assert torch.equal(sample.aux.decoded(), whole.aux[first : last + 1].decoded())
    assert sample.ids.tolist() == whole.ids[first : last + 2].tolist()
    assert sample.corrections.tolist() == [False, *whole.corrections[first + 1 : last + 2].tolist()]
    known = torch.ones(VOCAB, dtype=torch.bool)
    tokens, teacher = sample.trainable(known)
    of_whole, all_teachers = whole.trainable(known)
    assert isinstance(teacher, LastHidden)
    assert isinstance(all_teachers, LastHidden)
    places = [of_whole.tolist().index(token + first) for token in tokens.tolist()]
    assert torch.equal(teacher.states, all_teachers.states[places])
    inside = [one for one in whole.counterfactuals if first < one.start <= last + 1]
    assert [one.start + first for one in sample.counterfactuals] == [one.start for one in inside]


def test_a_row_that_is_not_finite_refuses_a_trace_unless_it_is_missing(maker: TraceMaker) -> None:
    trace = _missing(maker.trace(1), 6)
    assert read_sample(trace.SerializeToString(), maker.expected).num_taught
    del trace.payload.missing_rows[:]
    trace.payload.last_hidden.CopyFrom(maker.trace(1).payload.last_hidden)
    with pytest.raises(RefusedTrace, match="auxiliary hidden states are not finite"):
        read_sample(trace.SerializeToString(), maker.expected)


def test_gaps_and_likeliest_tokens_go_together(maker: TraceMaker, head: Tensor) -> None:
    trace = show_likeliest(maker.trace(1, num_prompt=4, num_output=10), head, k=5)
    trace.payload.missing_rows.extend([0, 5])
    trace.payload.top_k.ids[2 * 5] = 2**31  # row 5 of the text, the third that has a teacher
    sample = read_sample(trace.SerializeToString(), maker.expected)
    assert (sample.num_rows, sample.first_teacher_row) == (7, 0)
    tokens, teacher = sample.trainable(torch.ones(VOCAB, dtype=torch.bool))
    assert isinstance(teacher, TopK)
    assert teacher.ids[:, 0].tolist() == sample.ids[tokens].tolist()


def _k(trace: trace_pb2.Trace, k: int) -> None:
    trace.payload.top_k.k = k


def _one_id_less(trace: trace_pb2.Trace) -> None:
    trace.payload.top_k.ids.pop()


def _one_row_less(trace: trace_pb2.Trace) -> None:
    del trace.payload.top_k.ids[:5], trace.payload.top_k.log_probs[:5], trace.payload.top_k.log_sum_exp[:1]


def _one_sum_less(trace: trace_pb2.Trace) -> None:
    trace.payload.top_k.log_sum_exp.pop()


def _foreign_id(trace: trace_pb2.Trace) -> None:
    trace.payload.top_k.ids[7] = VOCAB


def _same_id(trace: trace_pb2.Trace) -> None:
    trace.payload.top_k.ids[7] = trace.payload.top_k.ids[6]


def _not_a_number(trace: trace_pb2.Trace) -> None:
    trace.payload.top_k.log_probs[7] = float("nan")


def _endless(trace: trace_pb2.Trace) -> None:
    trace.payload.top_k.log_probs[7] = float("-inf")


def _more_than_sure(trace: trace_pb2.Trace) -> None:
    trace.payload.top_k.log_probs[7] = 0.5


def _logits(trace: trace_pb2.Trace) -> None:
    trace.payload.top_k.log_probs[5:10] = [-0.1] * 5


def _late(trace: trace_pb2.Trace) -> None:
    trace.payload.first_teacher_row = 2**31


def _no_teacher(trace: trace_pb2.Trace) -> None:
    trace.payload.ClearField("teacher")


def _no_teacher_row(trace: trace_pb2.Trace) -> None:
    trace.payload.first_teacher_row = 13
    trace.payload.top_k.CopyFrom(trace_pb2.TopK(k=5))


def _all_missing(trace: trace_pb2.Trace) -> None:
    trace.payload.missing_rows.extend(range(13))


def _every_other_missing(trace: trace_pb2.Trace) -> None:
    trace.payload.missing_rows.extend(range(0, 13, 2))


def _missing_beyond(trace: trace_pb2.Trace) -> None:
    trace.payload.missing_rows.append(13)


def _missing_twice(trace: trace_pb2.Trace) -> None:
    trace.payload.missing_rows.extend([2, 2])


@pytest.mark.parametrize(
    ("damage", "label"),
    [
        pytest.param(lambda trace: _k(trace, 0), "malformed", id="k = 0"),
        pytest.param(lambda trace: _k(trace, 2**31), "malformed", id="absurd k"),
        pytest.param(lambda trace: _k(trace, 4), "malformed", id="another k"),
        pytest.param(_one_id_less, "malformed", id="ids and log-probabilities of unequal number"),
        pytest.param(_one_row_less, "malformed", id="a row less than states"),
        pytest.param(_one_sum_less, "malformed", id="a log-sum-exp less than rows"),
        pytest.param(_foreign_id, "malformed", id="token outside the vocabulary"),
        pytest.param(_same_id, "malformed", id="token named twice"),
        pytest.param(_not_a_number, "malformed", id="not a number"),
        pytest.param(_endless, "malformed", id="minus infinity"),
        pytest.param(_more_than_sure, "malformed", id="probability above 1"),
        pytest.param(_logits, "malformed", id="probabilities that add up to more than 1"),
        pytest.param(_late, "malformed", id="teacher after the text"),
        pytest.param(_no_teacher, "no_teacher", id="nothing of what the target predicted"),
        pytest.param(_no_teacher_row, "too_few_rows", id="no row has a teacher"),
        pytest.param(_all_missing, "too_few_rows", id="every row is missing"),
        pytest.param(_every_other_missing, "too_few_rows", id="every other row is missing"),
        pytest.param(_missing_beyond, "malformed", id="missing row beyond the text"),
        pytest.param(_missing_twice, "malformed", id="row missing twice"),
    ],
)
def test_likeliest_tokens_that_cannot_be_right_refuse_the_trace(
    maker: TraceMaker, head: Tensor, damage: Callable[[trace_pb2.Trace], None], label: str
) -> None:
    trace = show_likeliest(maker.trace(2, num_prompt=4, num_output=10), head, k=5)
    damage(trace)
    with pytest.raises(RefusedTrace, match=" ") as refused:
        read_sample(trace.SerializeToString(), maker.expected)
    assert refused.value.label == label


def test_a_trace_of_a_region_is_taken_by_a_trainer_there_and_by_no_other(maker: TraceMaker) -> None:
    trace = maker.trace(1)
    trace.header.policy.region = "eu"
    read_sample(trace.SerializeToString(), replace(maker.expected, region="eu"))
    with pytest.raises(RefusedTrace, match="may be stored in 'eu' only; this trainer is in 'us'"):
        read_sample(trace.SerializeToString(), replace(maker.expected, region="us"))
    read_sample(maker.data(1), replace(maker.expected, region="us"))  # a trace without a region


def test_a_sample_knows_how_likely_its_capture_was(maker: TraceMaker) -> None:
    assert read_sample(maker.data(1, probability=0.25), maker.expected).probability == 0.25


def test_a_trace_that_may_not_be_trained_on_is_stored_only_if_it_is_held_out(maker: TraceMaker) -> None:
    held_out = read_sample(maker.data(2, evaluation=True, may_train=False, tenant=7), maker.expected)

    assert (held_out.is_evaluation, held_out.tenant, held_out.tenant_text) == (True, 7, "0000000000000007")
    with pytest.raises(RefusedTrace, match="permits evaluation only"):
        read_sample(maker.data(2, may_train=False), maker.expected)

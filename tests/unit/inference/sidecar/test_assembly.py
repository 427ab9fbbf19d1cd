"""What becomes of the messages of a server's processes: counts, traces, and what is missing in them."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.tap_plugin import finished, prefill, rows, step

from updraft_chassis.tenants import hashes
from updraft_draft.tensors import packed
from updraft_inference.agent.selection import CaptureRates, Refusal, plan_of_chosen
from updraft_inference.engine import CaptureLoss, FinishReason, TopK
from updraft_inference.sidecar.assembly import PATIENCE_S, SILENCE_S, Assembler, Ended
from updraft_tap import wire

Message = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture
def assembler() -> Assembler:
    return Assembler(max_bytes=1 << 20)


def told(assembler: Assembler, *messages: Message, now_s: float = 0.0) -> list[Ended]:
    return [ended for header, tensors in messages for ended in assembler.take(header, tensors, now_s)]


def test_a_request_without_payload_is_counted_and_leaves_no_trace(assembler: Assembler) -> None:
    (ended,) = told(assembler, finished("a", 4, 3, captured=False))

    assert ended.finished is None
    counted = ended.counted
    assert (counted.reason, counted.num_prompt, counted.num_output) == (FinishReason.LENGTH, 4, 3)
    assert counted.duration_s == 0.05
    (sums,) = counted.sums
    assert (sums.draft_version, sums.verify_steps, sums.proposed, sums.accepted) == (0, 1, (1, 1, 1), (1, 0, 0))
    assert (sums.tokens, sums.duration_s) == (2, 0.03)


def test_each_end_of_the_wire_is_a_stop_a_limit_or_a_cut(assembler: Assembler) -> None:
    ended = told(assembler, *map(ending, wire.FINISHES))

    stop, cut = FinishReason.STOP, FinishReason.CANCELLED
    assert [one.counted.reason for one in ended] == [stop, FinishReason.LENGTH, stop, cut, cut, cut]
    assert not assembler.losses


def test_each_unknown_end_is_a_cut_and_is_logged_once(assembler: Assembler, caplog: pytest.LogCaptureFixture) -> None:
    ended = told(assembler, *map(ending, ("evaporated", "melted", "evaporated", "stopped")))

    assert [one.counted.reason for one in ended] == [FinishReason.CANCELLED] * 3 + [FinishReason.STOP]
    assert not assembler.losses
    assert [vars(record)["finish"] for record in caplog.records] == ["evaporated", "melted"]


def ending(finish: str) -> Message:
    header, tensors = finished("a", 4, 3, captured=False)
    return {**header, "finish": finish}, tensors


def test_rows_wait_packed_and_one_at_a_time_are_those_of_the_server() -> None:
    prompt, assembler = prefill("a", 4), Assembler(max_bytes=1 << 20, pack=packed)
    plain = Assembler(max_bytes=1 << 20)
    assert told(assembler, prompt) == told(plain, prompt) == []
    assert plain.num_bytes - assembler.num_bytes == prompt[1]["aux"].nbytes - packed(prompt[1]["aux"]).nbytes

    (ended,) = told(assembler, step("a", 4, 1), finished("a", 4, 3))

    assert ended.finished is not None
    hidden = ended.finished.hidden
    assert hidden is not None
    aux = torch.cat([prompt[1]["aux"], step("a", 4, 1)[1]["aux"]])
    assert hidden.aux.nbytes == packed(aux).nbytes
    for row in range(6):
        assert hidden.aux[row : row + 1].equal(packed(aux[row : row + 1]))


def test_rows_before_the_end_make_a_trace_at_the_end(assembler: Assembler) -> None:
    (ended,) = told(assembler, prefill("a", 4), step("a", 4, 1, version=3, rejected=1), finished("a", 4, 3))

    request = ended.finished
    assert request is not None
    assert (request.request.prompt_ids, request.output_ids) == ((0, 1, 2, 3), (4, 5, 6))
    assert [(one.start, one.accepted, one.draft_version) for one in request.steps] == [(1, 1, 3)]
    hidden = request.hidden
    assert hidden is not None
    assert hidden.aux[:][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert isinstance(hidden.teacher, TopK)
    assert (hidden.first_teacher_row, hidden.teacher.log_sum_exp.tolist()) == (3, [3, 4, 5])
    assert (hidden.missing_rows, len(hidden.counterfactuals)) == ((), 1)
    assert (ended.counted.num_uncaptured, ended.counted.num_missing_rows) == (0, 0)
    assert len(assembler) == assembler.num_bytes == 0


def test_rows_after_the_end_are_waited_for(assembler: Assembler) -> None:
    assert told(assembler, finished("a", 4, 3), prefill("a", 4)) == []
    assert assembler.due(PATIENCE_S / 2) == []

    (ended,) = told(assembler, step("a", 4, 1))

    assert ended.finished is not None
    assert ended.finished.num_missing_rows == 0
    assert assembler.due(PATIENCE_S) == []


def test_rows_that_never_come_are_missing_and_not_invented(assembler: Assembler) -> None:
    told(assembler, prefill("a", 4), step("a", 6, 1), finished("a", 4, 7))

    (ended,) = assembler.due(PATIENCE_S)

    assert ended.finished is not None
    assert ended.finished.hidden is not None
    assert ended.finished.hidden.missing_rows == (4, 5, 8, 9)
    assert ended.counted.num_missing_rows == 4
    assert len(assembler) == assembler.num_bytes == 0


def test_a_request_none_of_whose_rows_came_has_its_text_alone(assembler: Assembler) -> None:
    told(assembler, finished("a", 4, 3))

    (ended,) = assembler.due(PATIENCE_S)

    assert ended.finished is not None
    assert (ended.finished.output_ids, ended.finished.steps, ended.finished.hidden) == ((4, 5, 6), (), None)
    assert ended.counted.num_uncaptured == 1


def test_rows_that_only_one_process_chose_are_dropped(assembler: Assembler) -> None:
    (ended,) = told(assembler, prefill("a", 4), finished("a", 4, 3, captured=False))

    assert ended.finished is None
    assert assembler.losses == {CaptureLoss.UNKNOWN: 1}
    assert assembler.num_bytes == 0


def test_an_opted_out_request_leaves_no_trace_whatever_came_of_it(assembler: Assembler) -> None:
    (ended,) = told(assembler, prefill("a", 4), step("a", 4, 1), finished("a", 4, 3, domain="sql", permitted=False))

    assert (ended.finished, ended.terms.is_opted_out) == (None, True)
    assert len(assembler) == 0


def test_domain_and_constraint_come_with_the_end(assembler: Assembler) -> None:
    (ended,) = told(assembler, finished("a", 4, 3, captured=False, domain="sql", constrained=True))

    assert (ended.terms.domain, ended.terms.is_constrained, ended.terms.is_opted_out) == ("sql", True, False)


@pytest.mark.parametrize(("said", "known"), [({}, 0), ({"cached_tokens": 3}, 3), ({"cached_tokens": 9}, 4)])
def test_the_end_says_how_much_of_the_prompt_was_cached(assembler: Assembler, said: dict[str, Any], known: int) -> None:
    told(assembler, finished("a", 4, 3, **said))

    (ended,) = assembler.due(PATIENCE_S)

    assert ended.finished is not None
    assert ended.finished.num_cached == known


@pytest.mark.parametrize(("of_rows", "of_end"), [(0.5, 0.1), (0.1, 0.5)])
@pytest.mark.parametrize("is_end_first", [False, True])
def test_the_probability_is_that_with_which_both_processes_chose_the_request(
    assembler: Assembler, *, of_rows: float, of_end: float, is_end_first: bool
) -> None:
    rows, end = prefill("a", 4, probability=of_rows), finished("a", 4, 3, probability=of_end)

    (ended,) = told(assembler, *((end, rows) if is_end_first else (rows, end)), step("a", 4, 1))

    assert ended.probability == 0.1


def test_a_request_that_was_not_asked_is_no_opt_out_of_its_sender(assembler: Assembler) -> None:
    (unasked,) = told(assembler, finished("a", 4, 3, captured=False, permitted=False, asked=False))
    (opted_out,) = told(assembler, finished("b", 4, 3, captured=False, permitted=False, asked=True))

    assert [one.terms.is_unasked for one in (unasked, opted_out)] == [True, False]
    assert plan_of_chosen(CaptureRates(), unasked.trace_id, unasked.terms, probability=1.0).refusal is (
        Refusal.NOT_ASKED
    )


def test_the_tenant_and_what_it_permits_come_with_the_end(assembler: Assembler) -> None:
    (named,) = told(
        assembler,
        finished(
            *("a", 4, 3),
            captured=False,
            tenant=hashes.digest("acme"),
            train=False,
            opted_in=True,
            retention_s=60,
            region="eu",
        ),
    )
    (other,) = told(assembler, finished("b", 4, 3, captured=False))

    assert [(one.terms.retention_s, one.terms.region) for one in (named, other)] == [(60, "eu"), (0, "")]
    assert (named.terms.tenant, named.terms.may_train, named.terms.is_opted_in) == (hashes.digest("acme"), False, True)
    assert (other.terms.tenant, other.terms.may_train, other.terms.is_opted_in) == ("", True, False)


def test_rows_beyond_the_limit_are_lost_and_their_steps_kept() -> None:
    assembler = Assembler(max_bytes=200)

    (ended,) = told(assembler, prefill("a", 4), step("a", 4, 1), finished("a", 4, 3))

    assert assembler.losses == {CaptureLoss.MEMORY: 1}
    assert ended.finished is not None
    assert len(ended.finished.steps) == 1
    assert ended.finished.num_missing_rows == 2
    assert assembler.num_bytes == 0


def test_a_request_that_fell_silent_is_forgotten(assembler: Assembler) -> None:
    told(assembler, prefill("a", 4))
    told(assembler, prefill("b", 4), now_s=SILENCE_S)

    assert assembler.due(SILENCE_S + 1) == []

    assert len(assembler) == 1
    assert assembler.losses == {CaptureLoss.UNKNOWN: 1}


def test_a_connection_that_ends_completes_what_has_ended_and_forgets_the_rest(assembler: Assembler) -> None:
    told(assembler, prefill("a", 4), prefill("b", 4), finished("a", 4, 3))

    (ended,) = assembler.cut_off()

    assert ended.finished is not None
    assert ended.finished.request.request_id == "a"
    assert len(assembler) == assembler.num_bytes == 0


def with_counts(**changed: Any) -> Message:
    header, tensors = finished("a", 4, 3)
    return {**header, "counters": [header["counters"][0] | changed]}, tensors


def with_tokens(*tokens: float, dtype: torch.dtype) -> Message:
    """The end of a request of one prompt token and otherwise these."""
    header, _ = finished("a", 1, len(tokens))
    return header, {"tokens": torch.tensor([0, *tokens], dtype=dtype)}


def widened(message: Message, name: str) -> Message:
    """With one more column in a tensor."""
    header, tensors = message
    return header, tensors | {name: torch.cat([tensors[name], tensors[name][:, :1]], dim=1)}


@pytest.mark.parametrize("is_over", [False, True], ids=["running", "ended"])
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(widened(step("a", 4, 1), "aux"), id="width"),
        pytest.param(widened(step("a", 4, 1), "ids"), id="number of tokens"),
        pytest.param((step("a", 4, 1)[0], {**rows(4, 2), "aux": rows(4, 2)["aux"].bfloat16()}), id="type"),
    ],
)
def test_rows_of_another_form_than_the_first_ones_are_malformed(
    assembler: Assembler, other: Message, *, is_over: bool
) -> None:
    told(assembler, prefill("a", 4), *([finished("a", 4, 3)] if is_over else []))

    with pytest.raises(wire.FrameError, match="of the same request"):
        told(assembler, other)

    assert assembler.losses == {CaptureLoss.MALFORMED: 1}
    assert len(assembler.cut_off()) == int(is_over)
    assert len(assembler) == assembler.num_bytes == 0


def test_what_a_message_completed_before_its_defect_is_not_lost(assembler: Assembler) -> None:
    told(assembler, prefill("a", 4), finished("a", 4, 3))
    header, tensors = step("a", 4, 1)
    header["requests"].append({"rid": "b"})
    ends: list[Ended] = []

    with pytest.raises(wire.FrameError):
        ends.extend(assembler.take(header, tensors, 0.0))

    (ended,) = ends
    assert ended.finished is not None


@pytest.mark.parametrize("complete", [lambda one: one.due(PATIENCE_S), Assembler.cut_off], ids=["due", "cut off"])
def test_rows_that_make_no_trace_cost_the_trace_and_not_the_counts(
    assembler: Assembler, complete: Callable[[Assembler], list[Ended]]
) -> None:
    told(assembler, widened(prefill("a", 4), "log_probs"), prefill("b", 4), finished("a", 4, 3), finished("b", 4, 3))

    broken, sound = complete(assembler)

    assert (broken.finished, broken.counted.num_output) == (None, 3)
    assert sound.finished is not None
    assert assembler.losses == {CaptureLoss.MALFORMED: 1}
    assert len(assembler) == assembler.num_bytes == 0


@pytest.mark.parametrize("is_over", [False, True], ids=["running", "ended"])
@pytest.mark.parametrize("max_bytes", [1 << 20, 1], ids=["room", "no room"])
def test_rows_that_wait_keep_no_message_in_memory(max_bytes: int, *, is_over: bool) -> None:
    assembler, message = Assembler(max_bytes=max_bytes), prefill("a", 4)
    kept = [weakref.ref(tensor.untyped_storage()) for tensor in message[1].values()]
    told(assembler, *([finished("a", 4, 3)] if is_over else []), message)

    del message

    assert len(assembler) == 1
    assert not any(storage() for storage in kept)


@pytest.mark.parametrize("is_captured", [True, False])
def test_parts_that_come_after_the_end_are_counted_and_kept_nowhere(assembler: Assembler, *, is_captured: bool) -> None:
    told(assembler, prefill("a", 4), step("a", 4, 1), finished("a", 4, 3, captured=is_captured))
    before = assembler.losses[CaptureLoss.UNKNOWN]

    assert told(assembler, step("a", 6, 1), prefill("a", 4)) == []

    assert assembler.losses[CaptureLoss.UNKNOWN] == before + 2
    assert len(assembler) == assembler.num_bytes == 0


def test_the_largest_token_of_32_bits_is_one(assembler: Assembler) -> None:
    told(assembler, with_tokens((1 << 32) - 1, dtype=torch.int64))

    (ended,) = assembler.due(PATIENCE_S)

    assert ended.finished is not None
    assert ended.finished.output_ids == ((1 << 32) - 1,)


def test_an_id_of_any_length_is_remembered_shortly(assembler: Assembler) -> None:
    rid = 10_000 * "x"
    told(assembler, prefill(rid, 4))
    told(assembler, step(rid, 4, 1))
    (ended,) = told(assembler, finished(rid, 4, 3))

    assert ended.finished is not None
    assert ended.finished.num_missing_rows == 0
    assert max(map(len, assembler._over)) == 64


def test_an_end_that_is_said_twice_is_two_requests_and_leaks_nothing(assembler: Assembler) -> None:
    ends = told(assembler, finished("a", 4, 3), finished("a", 4, 3))

    assert len(ends) == 1
    assert len([*ends, *assembler.due(PATIENCE_S)]) == 2
    assert assembler.num_bytes == 0


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(({"kind": "finished"}, {}), id="without fields"),
        pytest.param(finished("a", 4, 3, prompt_tokens=-1), id="a negative count"),
        pytest.param(finished("a", 4, 3, prompt_tokens=5), id="fewer tokens than announced"),
        pytest.param(finished("a", 4, 3, counters=[{"version": "new"}]), id="counters that are none"),
        pytest.param(finished("a", 4, 3, probability=0.0), id="captured by chance 0"),
        pytest.param(prefill("a", 4, probability=1.5), id="a probability above 1"),
        pytest.param(prefill("a", 4, probability=None), id="a probability that is none"),
        pytest.param(finished("a", 4, 3, sampling=None), id="tokens without sampling"),
        pytest.param(with_tokens(1.5, dtype=torch.float32), id="tokens that are fractions"),
        pytest.param(with_tokens(7, dtype=torch.bfloat16), id="tokens of a type of fractions"),
        pytest.param(with_tokens(-1, dtype=torch.int32), id="a negative token"),
        pytest.param(with_tokens(1 << 32, dtype=torch.int64), id="a token above 32 bits"),
        pytest.param(({"kind": "steps", "requests": [3]}, {}), id="a step that is none"),
        pytest.param((step("a", 4, 1)[0], {}), id="a step without its rows"),
        pytest.param((step("a", 4, 1, version=-1)), id="a negative version"),
        pytest.param(with_counts(version=1 << 32), id="a version above 32 bits"),
        pytest.param(with_counts(accepted=[1 << 48, 0, 0]), id="a count whose sums might exceed 64 bits"),
    ],
)
def test_a_malformed_message_is_refused_and_counted(assembler: Assembler, message: Message) -> None:
    with pytest.raises(wire.FrameError):
        told(assembler, message)

    assert assembler.losses == {CaptureLoss.MALFORMED: 1}

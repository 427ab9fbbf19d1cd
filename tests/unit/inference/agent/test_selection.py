import uuid

import pytest

from updraft.fleet.v1 import fleet_pb2
from updraft_inference.agent.selection import CaptureRates, plan
from updraft_inference.engine import CaptureParams

IDS = [uuid.UUID(int=i).bytes for i in range(4000)]


def test_the_evaluation_slice_is_a_uniform_fraction_that_any_pod_chooses_alike() -> None:
    rates = CaptureRates(evaluation_fraction=0.1)

    chosen = [plan(rates, trace_id).is_evaluation for trace_id in IDS]

    assert sum(chosen) / len(IDS) == pytest.approx(0.1, abs=0.02)
    assert chosen == [plan(rates, trace_id).is_evaluation for trace_id in IDS]


def test_evaluation_always_carries_the_payload_and_the_rest_a_fraction() -> None:
    plans = [plan(CaptureRates(payload_fraction=0.25, evaluation_fraction=0.2), trace_id) for trace_id in IDS]

    held_out = [p for p in plans if p.is_evaluation]
    rest = [p for p in plans if not p.is_evaluation]
    assert all(p.params.payload and p.payload_probability == 1.0 for p in held_out)
    assert sum(p.params.payload for p in rest) / len(rest) == pytest.approx(0.25, abs=0.03)
    assert {p.payload_probability for p in rest} == {0.25}


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_none_and_all_mean_what_they_say(fraction: float) -> None:
    rates = CaptureRates(payload_fraction=fraction, evaluation_fraction=0)

    assert {plan(rates, trace_id).params.payload for trace_id in IDS} == {fraction == 1.0}


def test_hidden_states_are_asked_of_the_engine_only_for_a_payload() -> None:
    with_payload = plan(CaptureRates(payload_fraction=1, prompt_rows=7), IDS[0])
    without = plan(CaptureRates(payload_fraction=0, evaluation_fraction=0, prompt_rows=7), IDS[0])

    assert with_payload.params == CaptureParams(payload=True, prompt_rows=7)
    assert without.params == CaptureParams()


def test_rows_after_rejections_are_asked_for_only_where_they_may_be_learnt_from() -> None:
    rates = CaptureRates(payload_fraction=0.5, evaluation_fraction=0.2, counterfactual_rows=2)

    plans = [plan(rates, trace_id) for trace_id in IDS]

    assert {(p.params.payload and not p.is_evaluation, p.params.counterfactual_rows) for p in plans} == {
        (True, 2),
        (False, 0),
    }


@pytest.mark.parametrize(("is_wanted", "rows"), [(True, 2), (False, 0)])
def test_the_registry_may_forbid_rows_after_rejections_and_not_raise_their_number(
    *, is_wanted: bool, rows: int
) -> None:
    policy = fleet_pb2.CapturePolicy(enabled=True, payload_fraction=1, counterfactuals=is_wanted)

    assert CaptureRates(counterfactual_rows=2).under(policy).counterfactual_rows == rows


def test_a_request_that_opts_out_is_neither_captured_nor_asked_for() -> None:
    opted_out = plan(CaptureRates(evaluation_fraction=1), IDS[0], is_opted_out=True, domain="law")

    assert opted_out.is_opted_out
    assert not opted_out.is_captured
    assert opted_out.params == CaptureParams()
    assert opted_out.domain == ""


def test_the_registrys_policy_replaces_the_fractions() -> None:
    policy = fleet_pb2.CapturePolicy(enabled=True, payload_fraction=0.5, evaluation_fraction=0.0)

    rates = CaptureRates(prompt_rows=9).under(policy)

    assert (rates.payload_fraction, rates.evaluation_fraction, rates.prompt_rows) == (0.5, 0.0, 9)
    assert not plan(rates.under(fleet_pb2.CapturePolicy()), IDS[0]).is_captured

import uuid

import pytest

from updraft_inference.agent.credits import Chance
from updraft_inference.agent.selection import CaptureRates, CaptureTerms, Permissions, Refusal, plan, plan_of_chosen
from updraft_inference.engine import CaptureParams

IDS = [uuid.UUID(int=i).bytes for i in range(4000)]


def test_the_evaluation_slice_is_a_uniform_fraction_that_any_pod_chooses_alike() -> None:
    rates = CaptureRates(evaluation_fraction=0.1)

    chosen = [plan(rates, trace_id).is_evaluation for trace_id in IDS]

    assert sum(chosen) / len(IDS) == pytest.approx(0.1, abs=0.02)
    assert chosen == [plan(rates, trace_id).is_evaluation for trace_id in IDS]


def test_without_a_grant_evaluation_always_carries_the_payload_and_the_rest_a_fraction() -> None:
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


def test_a_request_that_opts_out_is_neither_captured_nor_asked_for() -> None:
    terms = CaptureTerms(is_opted_out=True, domain="law")

    opted_out = plan(CaptureRates(evaluation_fraction=1), IDS[0], terms)

    assert opted_out.refusal is Refusal.OPTED_OUT
    assert not opted_out.is_captured
    assert opted_out.params == CaptureParams()
    assert opted_out.domain == ""


@pytest.mark.parametrize(
    ("of_pod", "of_tenant", "expected"),
    [("", "", ""), ("eu", "", "eu"), ("", "us", "us"), ("eu", "eu", "eu"), ("eu", "us", Refusal.OTHER_REGION)],
)
def test_a_trace_is_stored_in_the_region_that_pod_and_tenant_allow_or_not_captured(
    of_pod: str, of_tenant: str, expected: str
) -> None:
    rates = CaptureRates(permissions=Permissions(region=of_pod))
    found = plan(rates, IDS[0], CaptureTerms(region=of_tenant, retention_s=3600))
    if isinstance(expected, Refusal):
        assert (found.refusal, found.is_captured, found.params.payload) == (expected, False, False)
    else:
        assert found.permissions == Permissions(region=expected, retention_seconds=3600)


@pytest.mark.parametrize(
    "terms",
    [
        CaptureTerms(may_train=False, may_retain=False),
        CaptureTerms(may_retain=False),
        CaptureTerms(is_constrained=True),
    ],
)
def test_what_the_trainer_would_refuse_has_no_payload_and_says_why(terms: CaptureTerms) -> None:
    plans = [plan(CaptureRates(), trace_id, terms) for trace_id in IDS[:50]]

    assert {(p.is_captured, p.params.payload, p.payload_probability) for p in plans} == {(True, False, 0.0)}
    assert {(p.permissions.train, p.permissions.retain, p.is_constrained) for p in plans} == {
        (terms.may_train, terms.may_retain, terms.is_constrained)
    }


@pytest.mark.attack(
    boundary="client",
    attack="a header that permits more than the pod's policy",
    outcome="the stricter of the two holds",
)
@pytest.mark.parametrize(
    ("own", "asked", "permitted"),
    [
        (Permissions(), CaptureTerms(), Permissions()),
        (Permissions(train=False), CaptureTerms(may_train=True), Permissions(train=False)),
        (Permissions(retain=False), CaptureTerms(may_train=False), Permissions(train=False, retain=False)),
        (Permissions(region="eu"), CaptureTerms(), Permissions(region="eu")),
    ],
)
def test_a_request_may_permit_less_than_its_pod_and_never_more(
    own: Permissions, asked: CaptureTerms, permitted: Permissions
) -> None:
    assert plan(CaptureRates(permissions=own), IDS[0], asked).permissions == permitted


def test_a_payload_is_taken_with_the_lower_of_both_probabilities_and_says_with_which() -> None:
    rates = CaptureRates(payload_fraction=0.5, evaluation_fraction=0.2)

    scarce = [plan(rates, trace_id, chance=Chance(payload=0.25, held_out=0.75)) for trace_id in IDS]
    plenty = [plan(rates, trace_id, chance=Chance(payload=9.0, held_out=9.0)) for trace_id in IDS]

    assert {(p.is_evaluation, p.payload_probability) for p in scarce} == {(False, 0.25), (True, 0.75)}
    assert {(p.is_evaluation, p.payload_probability) for p in plenty} == {(False, 0.5), (True, 1.0)}
    rest = [p.params.payload for p in scarce if not p.is_evaluation]
    assert sum(rest) / len(rest) == pytest.approx(0.25, abs=0.03)
    held_out = [p.params.payload for p in scarce if p.is_evaluation]
    assert sum(held_out) / len(held_out) == pytest.approx(0.75, abs=0.06)


def test_scarce_credits_change_which_requests_have_payloads_and_not_which_are_held_out() -> None:
    scarce = [plan(CaptureRates(), trace_id, chance=Chance(payload=0.01, held_out=0.02)) for trace_id in IDS]

    assert [p.is_evaluation for p in scarce] == [plan(CaptureRates(), trace_id).is_evaluation for trace_id in IDS]


def test_the_plan_of_a_request_that_a_server_chose_states_the_servers_probability() -> None:
    rates = CaptureRates(evaluation_fraction=0.5, prompt_rows=7, counterfactual_rows=3)
    plans = [plan_of_chosen(rates, i.to_bytes(16), CaptureTerms(domain="sql"), probability=0.25) for i in range(64)]

    assert {(one.payload_probability, one.domain, one.params.payload) for one in plans} == {(0.25, "sql", True)}
    assert {(one.is_evaluation, one.params.counterfactual_rows) for one in plans} == {(True, 0), (False, 3)}


@pytest.mark.parametrize(
    "terms", [CaptureTerms(is_opted_out=True), CaptureTerms(may_retain=False), CaptureTerms(is_constrained=True)]
)
def test_what_a_sender_refuses_has_no_payload_though_a_server_chose_it(terms: CaptureTerms) -> None:
    found = plan_of_chosen(CaptureRates(), b"0" * 16, terms, probability=1.0)

    assert (found.params.payload, found.is_captured) == (False, not terms.is_opted_out)


def test_a_request_that_may_not_be_trained_on_has_a_payload_only_if_it_is_held_out() -> None:
    rates, terms = CaptureRates(evaluation_fraction=0.2), CaptureTerms(may_train=False)

    for plans in (
        [plan(rates, trace_id, terms) for trace_id in IDS],
        [plan_of_chosen(rates, trace_id, terms, probability=1.0) for trace_id in IDS],
    ):
        assert {(p.is_evaluation, p.params.payload, p.permissions.train) for p in plans} == {
            (True, True, False),
            (False, False, False),
        }
        assert [p.is_evaluation for p in plans] == [plan(rates, trace_id).is_evaluation for trace_id in IDS]


def test_where_the_pod_forbids_training_nothing_has_a_payload() -> None:
    rates = CaptureRates(evaluation_fraction=1, permissions=Permissions(train=False))

    for found in (plan(rates, IDS[0]), plan_of_chosen(rates, IDS[0], probability=1.0)):
        assert (found.is_captured, found.is_evaluation, found.params.payload) == (True, False, False)


def test_where_senders_opt_in_all_others_are_not_captured() -> None:
    rates = CaptureRates(needs_opt_in=True)

    assert plan(rates, IDS[0], CaptureTerms()).refusal is Refusal.NOT_OPTED_IN
    assert plan(rates, IDS[0], CaptureTerms(is_opted_in=True)).is_captured
    assert plan(rates, IDS[0], CaptureTerms(is_opted_in=True, is_opted_out=True)).refusal is Refusal.OPTED_OUT
    assert plan(rates, IDS[0], CaptureTerms(is_opted_in=True, is_unasked=True)).refusal is Refusal.NOT_ASKED

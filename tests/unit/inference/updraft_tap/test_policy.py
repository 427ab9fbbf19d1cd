from typing import Any

import pytest

from updraft_tap.http.terms import Terms
from updraft_tap.policy import CaptureOptions, Policy, captured_requests, read_policy

IDS = [f"request-{i}" for i in range(1000)]
LIGHT, ALL = CaptureOptions(), CaptureOptions(payload=True)


def test_without_a_policy_no_request_gives_rows() -> None:
    assert all(Policy().options(rid) is None for rid in IDS)


def test_a_share_is_chosen_by_the_id_alone_and_a_larger_share_keeps_it() -> None:
    few, many = (
        {rid for rid in IDS if Policy(payload=share, prompt_rows=3, counterfactual_rows=1).options(rid)}
        for share in (0.2, 0.6)
    )

    assert few < many
    assert 150 < len(few) < 250
    assert 550 < len(many) < 650


def test_the_options_are_those_of_the_policy() -> None:
    policy = read_policy({"kind": "policy", "payload": 1, "prompt_rows": 5, "counterfactual_rows": 2})

    assert policy.options("a") == CaptureOptions(payload=True, prompt_rows=5, counterfactual_rows=2, probability=1.0)


def test_a_policy_may_require_that_senders_opt_in() -> None:
    opt_in = read_policy({"payload": 1, "prompt_rows": 0, "counterfactual_rows": 0, "opt_in": True})

    assert [opt_in.permits(terms) for terms in (Terms(), Terms(opted_in=True))] == [False, True]
    assert not opt_in.permits(Terms(opted_in=True, permitted=False))
    assert [Policy().permits(terms) for terms in (Terms(), Terms(permitted=False))] == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"payload": 1.5},
        {"payload": -0.1},
        {"payload": float("nan")},
        {"payload": "all"},
        {"payload": True},
        {"payload": None},
        {"prompt_rows": -1},
        {"prompt_rows": 1.5},
        {"counterfactual_rows": None},
        {"opt_in": 1},
    ],
)
def test_what_is_no_policy_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        read_policy({"payload": 0.5, "prompt_rows": 0, "counterfactual_rows": 0, **change})


@pytest.mark.parametrize("requests", [[], [("a", None), ("b", None)]])
def test_a_batch_without_options_is_of_no_interest(requests: Any) -> None:
    assert captured_requests(requests) is None


def test_captured_requests_keep_their_places() -> None:
    captured = captured_requests([("a", None), ("b", ALL), ("c", LIGHT), ("d", ALL)])

    assert captured is not None
    assert (captured.batch_size, captured.places, captured.rids) == (4, (1, 2, 3), ("b", "c", "d"))
    assert captured.payload == (0, 2)

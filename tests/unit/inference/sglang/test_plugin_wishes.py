from types import SimpleNamespace
from typing import Any

import pytest

from updraft_sglang.capture_options import Wish, interest_in, wish_of


def request(rid: str, custom_params: object) -> Any:
    return SimpleNamespace(rid=rid, sampling_params=SimpleNamespace(custom_params=custom_params))


def test_a_wish_is_read() -> None:
    said = {"payload": True, "prompt_rows": 3, "counterfactual_rows": 2}
    assert wish_of({"updraft": said, "thinking_budget": 5}) == Wish(payload=True, prompt_rows=3, counterfactual_rows=2)


def test_an_empty_wish_is_for_the_light_record() -> None:
    assert wish_of({"updraft": {}}) == Wish()


@pytest.mark.parametrize(
    "custom_params",
    [
        None,
        {},
        [],
        "updraft",
        {"updraft": None},
        {"updraft": True},
        {"updraft": {"prompt_rows": -1}},
        {"updraft": {"prompt_rows": 1.5}},
        {"updraft": {"counterfactual_rows": True}},
    ],
)
def test_what_is_no_sound_wish_counts_as_none(custom_params: object) -> None:
    assert wish_of(custom_params) is None


@pytest.mark.parametrize("requests", [None, [], [request("a", None), request("b", {})]])
def test_a_batch_without_wishes_is_of_no_interest(requests: Any) -> None:
    assert interest_in(requests) is None


def test_interest_keeps_the_places_of_those_with_a_wish() -> None:
    interest = interest_in(
        [
            request("a", None),
            request("b", {"updraft": {"payload": True}}),
            request("c", {"updraft": {}}),
            request("d", {"updraft": {"payload": True, "prompt_rows": 4}}),
        ]
    )

    assert interest is not None
    assert (interest.batch_size, interest.places, interest.rids) == (4, (1, 2, 3), ("b", "c", "d"))
    assert (interest.payload, interest.payload_places) == ((0, 2), (1, 3))

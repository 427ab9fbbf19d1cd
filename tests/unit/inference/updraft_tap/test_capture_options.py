from typing import Any

import pytest

from updraft_tap.capture_options import CaptureOptions, captured_requests, read_options


def request(rid: str, custom_params: object) -> tuple[str, CaptureOptions | None]:
    return rid, read_options(custom_params)


def test_a_wish_is_read() -> None:
    fields = {"payload": True, "prompt_rows": 3, "counterfactual_rows": 2}
    assert read_options({"updraft": fields, "thinking_budget": 5}) == CaptureOptions(
        payload=True, prompt_rows=3, counterfactual_rows=2
    )


def test_an_empty_wish_is_for_the_light_record() -> None:
    assert read_options({"updraft": {}}) == CaptureOptions()


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
    assert read_options(custom_params) is None


@pytest.mark.parametrize("requests", [[], [request("a", None), request("b", {})]])
def test_a_batch_without_wishes_is_of_no_interest(requests: Any) -> None:
    assert captured_requests(requests) is None


def test_interest_keeps_the_places_of_those_with_a_wish() -> None:
    captured = captured_requests(
        [
            request("a", None),
            request("b", {"updraft": {"payload": True}}),
            request("c", {"updraft": {}}),
            request("d", {"updraft": {"payload": True, "prompt_rows": 4}}),
        ]
    )

    assert captured is not None
    assert (captured.batch_size, captured.places, captured.rids) == (4, (1, 2, 3), ("b", "c", "d"))
    assert captured.payload == (0, 2)

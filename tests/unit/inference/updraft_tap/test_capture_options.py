from typing import Any

import pytest

from updraft_tap.capture_options import CaptureOptions, captured_requests

LIGHT, ALL = CaptureOptions(), CaptureOptions(payload=True)


@pytest.mark.parametrize("requests", [[], [("a", None), ("b", None)]])
def test_a_batch_without_options_is_of_no_interest(requests: Any) -> None:
    assert captured_requests(requests) is None


def test_captured_requests_keep_their_places() -> None:
    captured = captured_requests([("a", None), ("b", ALL), ("c", LIGHT), ("d", ALL)])

    assert captured is not None
    assert (captured.batch_size, captured.places, captured.rids) == (4, (1, 2, 3), ("b", "c", "d"))
    assert captured.payload == (0, 2)

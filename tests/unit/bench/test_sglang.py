"""The bars of swaps in `make bench-sglang`."""

from bench.sglang.swaps import Swaps


def test_swaps_miss_their_bars_if_the_server_stands_still_for_long_or_a_request_changes() -> None:
    good, bad = Swaps([3.0, 100.0, 4.0], requests=24, changed=0), Swaps([30.0, 30.0, 2.0], requests=24, changed=1)

    assert [line.bar.met for line in good.lines()] == [True, True]
    assert [(line.bar.measured, line.bar.met) for line in bad.lines()] == [(1, False), (30.0, False)]
    assert "longest 100 ms, 24 requests" in next(good.figures())

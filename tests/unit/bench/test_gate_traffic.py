"""What the simulated fleet of `make bench-gate` counts."""

import numpy as np
import pytest
from bench.gate.traffic import SimulatedFleet, Truth


def counted(share_alone: float) -> np.ndarray:
    """Requests, verify steps, tokens and seconds of short answers, by version: two minutes of 100 pods, half with each."""
    truth = Truth(pods=100, effect=0.1, median_tokens=8, share_alone=share_alone)
    fleet = SimulatedFleet(truth, np.random.default_rng(3))
    for _ in range(12):
        fleet.serve(np.arange(100) < 50)
    totals: np.ndarray = fleet.totals.sum(axis=2)
    return totals


def test_requests_without_a_drawn_step_count_for_nothing_and_drawn_steps_show_the_same_drafts() -> None:
    for drawn, every in zip(counted(1 / 8), counted(1.0), strict=True):
        requests, steps, tokens, seconds = drawn
        assert requests.is_integer()
        assert steps.is_integer()
        assert requests < steps
        assert requests < 0.6 * every[0], "most have few steps, and seven of eight steps are not drawn"
        assert steps == pytest.approx(every[1] / 8, rel=0.1)
        assert tokens / steps == pytest.approx(every[2] / every[1], rel=0.05)
        assert seconds / steps == pytest.approx(every[3] / every[1], rel=0.05)

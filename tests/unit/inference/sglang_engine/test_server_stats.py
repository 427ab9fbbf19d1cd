"""What the steps that were not seen add up to."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.requests import step

from updraft_inference.engine import VerifyStep
from updraft_inference.sglang_engine.server_stats import ServerStats, label, uncaptured, version_of


def sums(histogram: Sequence[int], *spans: tuple[int, int, int], lookahead: int = 3) -> ServerStats:
    meta = {
        "spec_correct_drafts_histogram": list(histogram),
        "weight_versions": [{"version": label(v), "start": start, "end": end} for v, start, end in spans],
    }
    return ServerStats.of(meta, lookahead)


@pytest.mark.parametrize(
    ("label", "version"), [("v7", 7), ("v0", 0), ("default", 0), ("v7b", 0), (None, 0), ("t1/d7", 0)]
)
def test_only_our_own_labels_name_a_version(label: object, version: int) -> None:
    assert version_of(label) == version


def test_nothing_is_left_where_every_step_came() -> None:
    steps = [step(1, 0, k=3), step(2, 2, k=3)]

    assert uncaptured(sums([1, 0, 1], (1, 0, 5)), steps, 5, 1.0) is None


def test_a_request_that_never_speculated_has_no_sums() -> None:
    assert uncaptured(ServerStats.of({}, 3), [], 1, 0.0) is None


def test_what_is_left_has_the_version_of_the_tokens_that_no_step_gave() -> None:
    steps = [step(1, 1, k=3, version=4), step(6, 0, k=3, version=5)]

    rest = uncaptured(sums([1, 1, 1], (4, 0, 6), (5, 6, 7)), steps, 7, 6.0)

    assert rest is not None
    assert (rest.draft_version, rest.verify_steps, rest.tokens) == (4, 1, 3)
    assert (rest.proposed, rest.accepted) == ((1, 1, 1), (1, 1))
    assert rest.duration_s == 3.0


@settings(deadline=None)
@given(accepted=st.lists(st.integers(0, 3), min_size=1, max_size=12), lost=st.sets(st.integers(0, 11)))
def test_seen_and_unseen_steps_always_add_up_to_the_servers_sums(accepted: list[int], lost: set[int]) -> None:
    steps: list[VerifyStep] = []
    start = 1
    for number in accepted:
        steps.append(step(start, number, k=3))
        start += number + 1
    captured = [one for index, one in enumerate(steps) if index not in lost]
    histogram = [accepted.count(num) for num in range(4)]

    rest = uncaptured(sums(histogram, (1, 0, start)), captured, start, 1.0)

    assert len(captured) + (rest.verify_steps if rest else 0) == len(accepted)
    assert sum(one.accepted for one in captured) + (sum(rest.accepted) if rest else 0) == sum(accepted)
    assert sum(one.emitted for one in captured) + (rest.tokens if rest else 0) == start - 1

from dataclasses import replace

import numpy as np
import pytest

from updraft_rollouts.evidence import Paired
from updraft_trainer.data.clusters import FEATURE_SIZE, Feature
from updraft_trainer.data.retention import CHUNK_MARK
from updraft_trainer.data.selection import TrafficMix
from updraft_trainer.publishing.estimate import (
    BestDrafts,
    Evidence,
    GainEstimate,
    against,
    is_better,
    looks_better,
    merged,
)


def walked(**steps: int) -> GainEstimate:
    """Requests, named by kind and number, with the baseline's steps."""
    return GainEstimate(
        trace_ids=tuple(steps),
        domains=("",) * len(steps),
        pairs=tuple(Paired(tokens=50, candidate_steps=9, baseline_steps=n, kind=id_[0]) for id_, n in steps.items()),
    )


def test_the_best_draft_of_each_kind_is_remembered_when_a_worse_one_serves() -> None:
    best = BestDrafts()
    assert best.update(walked(a1=10, a2=12, b1=20)) == {"a1": 10, "a2": 12, "b1": 20}
    assert best.update(walked(a1=11, a2=13, b1=15)) == {"a1": 10, "a2": 12, "b1": 15}
    assert best.update(walked(a1=9, a2=11, b1=16)) == {"a1": 9, "a2": 11, "b1": 15}


def test_drafts_are_compared_on_the_requests_that_both_have_walked() -> None:
    best = BestDrafts()
    best.update(walked(a1=10, a2=12))
    assert best.update(walked(a2=13, a3=1)) == {"a2": 12}
    assert best.update(walked(a4=30)) == {"a4": 30}, "of the best draft no request is left"


def test_the_best_draft_of_a_kind_that_is_not_judged_any_more_is_forgotten() -> None:
    best = BestDrafts()
    best.update(walked(a1=10, b1=10))
    assert best.update(walked(b1=12)) == {"b1": 10}
    assert best.update(walked(a1=11, b1=12)) == {"a1": 11, "b1": 10}


def test_two_candidates_are_compared_on_the_requests_that_both_have_walked() -> None:
    longer, other = walked(a1=30, a2=30, a3=30, b1=30), walked(a2=20, a3=20, b1=20, b2=20)
    compared = against(longer, other)
    assert compared.trace_ids == ("a2", "a3", "b1")
    assert [pair.baseline_steps for pair in compared.pairs] == [9, 9, 9]
    assert against(walked(a1=1), walked(a2=1)).gain(0.9) is None


def test_without_learned_requests_each_kind_that_is_left_keeps_its_share_of_todays_traffic() -> None:
    weights = [1.5, 1.5, 0.5, 0.5, 1.0]  # shares of 0.6, 0.2 and 0.2
    made = walked(a1=10, a2=10, b1=10, b2=10, c1=10)
    made = replace(made, pairs=tuple(replace(p, weight=w) for p, w in zip(made.pairs, weights, strict=True)))
    left = made.without_learned({"a1": 1, "b1": 0, "c1": 6})
    assert left.trace_ids == ("a2", "b1", "b2")
    assert [pair.weight / len(left.pairs) for pair in left.pairs] == pytest.approx([0.6, 0.1, 0.1])
    assert left.covered == pytest.approx(0.8)


def test_a_request_of_which_a_chunk_was_learned_is_learned() -> None:
    chunks = [f"a1{CHUNK_MARK}{n}" for n in range(2)]
    made = replace(walked(a1=10, b1=10), trace_ids=(chunks[0], "b1"))
    assert made.without_learned({chunks[1]: 1}).trace_ids == ("b1",)
    assert not made.without_learned({chunks[1]: 1, "b1": 1}).pairs


def judged(**steps: int) -> GainEstimate:
    """A draft's own steps by request; they are named by kind and number."""
    made = walked(**steps)
    return replace(made, pairs=tuple(replace(pair, candidate_steps=pair.baseline_steps) for pair in made.pairs))


def test_training_goes_on_from_a_draft_that_looks_better_and_needs_no_certainty() -> None:
    trained, closed = judged(a1=10, a2=12, a3=20), judged(a1=9, a2=14, a3=17)
    gain = against(closed, trained).gain(0.9)
    assert gain is not None
    assert gain.low_percent < 0 < gain.percent
    assert is_better(closed, trained)
    assert not is_better(trained, closed)


def test_a_draft_that_is_surely_worse_for_a_kind_may_look_better_but_training_does_not_go_on_from_it() -> None:
    trained = judged(**{f"a{n}": 20 for n in range(8)}, **{f"b{n}": 20 for n in range(8)})
    closed = judged(**{f"a{n}": 10 for n in range(8)}, **{f"b{n}": 25 + n % 2 for n in range(8)})
    gain = against(closed, trained).gain(0.9)
    assert gain is not None
    assert gain.percent > 0
    assert looks_better(closed, trained)
    assert not looks_better(trained, closed)
    assert not is_better(closed, trained)


def test_the_evidence_of_several_ranks_is_that_of_all_their_requests() -> None:
    """Both have requests of a kind that each calls by its own name; one request is stored by both."""
    tokens = np.ones(FEATURE_SIZE, dtype=np.float32) / np.sqrt(np.float32(FEATURE_SIZE))
    parts = [
        evidence("content:1", walked(a1=10, a2=10), {"content:1": tokens}, num_recent=30),
        evidence("content:7", walked(a2=10, a3=10), {"content:7": tokens}, num_recent=10),
        evidence("domain:x", walked(x1=10), {}, num_recent=40),
    ]
    whole = merged(parts)
    assert whole.estimate.trace_ids == ("a1", "a2", "a3", "x1")
    assert [pair.kind for pair in whole.estimate.pairs] == ["content:1"] * 3 + ["domain:x"]
    assert [pair.weight for pair in whole.estimate.pairs] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])
    assert whole.estimate.covered == 1.0
    assert len(whole.outputs) == 4


def test_the_evidence_of_one_rank_is_as_it_is() -> None:
    alone = evidence("content:1", walked(a1=10), {}, num_recent=3)
    assert merged([alone]) is alone


def test_ranks_without_requests_have_no_evidence() -> None:
    nothing = Evidence(estimate=walked())
    assert merged([nothing, nothing]).estimate.gain(0.9) is None


def evidence(kind: str, estimate: GainEstimate, means: dict[str, Feature], *, num_recent: int) -> Evidence:
    """Of a rank whose traffic is of one kind."""
    mix = TrafficMix(kinds=dict.fromkeys(estimate.trace_ids, kind), shares={kind: 1.0}, num_recent=num_recent)
    return Evidence(estimate=estimate, outputs=((5, 0),) * len(estimate.trace_ids), mix=mix, means=means)

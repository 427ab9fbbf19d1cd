import pytest

from updraft_rollouts.evidence import Paired
from updraft_trainer.publishing.decision import PublishThresholds, decide
from updraft_trainer.publishing.estimate import GainEstimate

THRESHOLDS = PublishThresholds(min_samples=8, min_gain_percent=1.0, min_first_gain_percent=15.0, confidence=0.9)


def estimate(*, num: int, candidate: int, baseline: int, spread: int = 0) -> GainEstimate:
    """`num` requests of 100 tokens; every other one deviates by `spread` steps."""
    return GainEstimate(
        trace_ids=tuple(str(n) for n in range(num)),
        domains=("",) * num,
        pairs=tuple(
            Paired(tokens=100, candidate_steps=candidate + spread * (-1) ** n, baseline_steps=baseline)
            for n in range(num)
        ),
    )


@pytest.mark.parametrize(
    ("evidence", "version", "expected", "words"),
    [
        pytest.param(estimate(num=12, candidate=50, baseline=60), 3, True, "gain +20.0 %", id="better"),
        pytest.param(estimate(num=7, candidate=50, baseline=60), 3, False, "7 held-out", id="few requests"),
        pytest.param(estimate(num=0, candidate=1, baseline=1), 3, False, "0 held-out", id="none"),
        pytest.param(
            estimate(num=12, candidate=58, baseline=60, spread=20), 3, False, "the lower bound is below", id="noise"
        ),
        pytest.param(estimate(num=12, candidate=61, baseline=60), 3, False, "the lower bound is below", id="worse"),
        pytest.param(estimate(num=12, candidate=90, baseline=100), 0, False, "first draft", id="small first"),
        pytest.param(estimate(num=12, candidate=80, baseline=100), 0, True, "gain +25.0 %", id="first"),
    ],
)
def test_a_draft_is_published_when_the_evidence_says_so(
    evidence: GainEstimate, version: int, *, expected: bool, words: str
) -> None:
    should_publish, reason = decide(evidence, baseline_version=version, thresholds=THRESHOLDS)
    assert should_publish is expected
    assert words in reason

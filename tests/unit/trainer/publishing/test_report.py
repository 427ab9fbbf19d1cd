import pytest

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import Conflict
from updraft_trainer.publishing.report import TrainingReport

GOOD = "the draft of 400 samples is 8.0 % better than version 3"


@pytest.fixture
def sent() -> list[str]:
    return []


@pytest.fixture
def report(sent: list[str]) -> TrainingReport:
    return TrainingReport(sent.append)


def test_a_candidate_is_reported_with_what_was_decided(report: TrainingReport, sent: list[str]) -> None:
    report.decided("it waits")
    report.withheld(GOOD, "the rollout is paused")
    assert sent == ["it waits", f"{GOOD}; it is not published because the rollout is paused"]


def test_work_that_takes_long_is_shown_until_it_ends(report: TrainingReport, sent: list[str]) -> None:
    report.busy("a draft is being judged by other requests")
    report.decided("it waits")
    report.busy("a draft in closed form is being fitted")
    report.done()
    assert sent == [
        "a draft is being judged by other requests",
        "it waits",
        "it waits; a draft in closed form is being fitted",
        "it waits",
    ]


def test_after_a_version_serves_nothing_new_is_learnt_until_the_next_step(
    report: TrainingReport, sent: list[str]
) -> None:
    report.published(pb.Version(version=4, phase=pb.PHASE_STABLE, reason="gain +8.0 %"), step=80)
    report.idle(80)
    report.decided("the draft of 410 samples is not better")
    report.idle(81)
    assert sent == [
        "version 4 was published and serves: gain +8.0 %",
        "nothing new was learned since version 4",
        "the draft of 410 samples is not better",
        "the draft of 410 samples is not better; new requests are needed to learn more",
    ]


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (pb.PHASE_REJECTED, "was rejected"),
        (pb.PHASE_CANARY, "was published and is in canary"),
        (pb.PHASE_HELD, "was published and waits"),
    ],
)
def test_the_next_candidate_says_what_became_of_the_last_one(
    report: TrainingReport, sent: list[str], phase: pb.Phase.ValueType, words: str
) -> None:
    report.published(pb.Version(version=5, phase=phase, reason="why"), step=80)
    report.backed_off(GOOD)
    report.idle(80)
    later = f"{GOOD}; the next version waits a while because version 5 {words}"
    assert sent == [f"version 5 {words}: why", later, f"{later}; new requests are needed to learn more"]


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        (2.6, " (learned by heart: 2.60 tokens per step on requests that it learned, 1.70 on others)"),
        (2.0, ""),
    ],
)
def test_a_draft_that_has_learned_its_requests_by_heart_says_so(
    report: TrainingReport, sent: list[str], trained: float, words: str
) -> None:
    report.decided("it is not sure yet")
    report.learned(trained, 1.7)
    report.idle(80)
    assert sent[-1] == f"it is not sure yet; new requests are needed to learn more{words}"


def test_a_refusal_is_reported_with_its_reason(report: TrainingReport, sent: list[str]) -> None:
    report.refused(Conflict("another draft vocabulary"))
    assert sent == ["the registry refused a version: another draft vocabulary"]


def test_a_trainer_that_has_judged_nothing_yet_has_nothing_to_add(report: TrainingReport, sent: list[str]) -> None:
    report.idle(0)
    assert sent == []


@pytest.mark.parametrize(("stable", "sentence"), [(4, "version 4 serves"), (3, "version 4 did not come to serve")])
def test_the_end_of_a_canary_is_reported_once(
    report: TrainingReport, sent: list[str], stable: int, sentence: str
) -> None:
    report.published(pb.Version(version=4, phase=pb.PHASE_CANARY), step=80)
    report.follow(3, 4)
    report.follow(stable, 0)
    report.follow(stable, 0)
    report.idle(80)
    then = (
        "nothing new was learned since version 4"
        if stable == 4
        else f"{sentence}; new requests are needed to learn more"
    )
    assert sent == ["version 4 was published and is in canary", sentence, then]

import pytest
from tests.support.clock import ManualClock

from updraft.registry.v1 import registry_pb2 as pb
from updraft_cli.demo.plan import make_plan
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.watch import note_serving, note_training, transition
from updraft_cli.local.scrape import parse

SERVING = """
updraft_inference_draft_version 3
updraft_inference_swap_pause_seconds_count 2
updraft_inference_swap_pause_seconds_sum 0.006
"""

TRAINING = """
updraft_trainer_optimizer_steps_total 40
updraft_trainer_loss 2.5
updraft_trainer_acceptance_length_tokens{role="candidate"} 1.5
updraft_trainer_acceptance_length_tokens{role="baseline"} 1.25
updraft_trainer_gain_ratio{bound="mean"} 0.2
updraft_trainer_gain_ratio{bound="low"} 0.15
updraft_trainer_gain_ratio{bound="high"} 0.25
"""


@pytest.fixture
def recording() -> Recording:
    return Recording(plan=make_plan(minutes=9, streams=4, seed=0), clock=ManualClock())


def test_another_version_in_the_engine_is_a_swap(recording: Recording) -> None:
    note_serving(recording, parse(SERVING))
    note_serving(recording, parse(SERVING))
    assert [swap.version for swap in recording.swaps] == [3]
    assert recording.swap_pause_mean_s == pytest.approx(0.003)


def test_the_trainers_estimate_is_noted_with_its_interval(recording: Recording) -> None:
    note_training(recording, parse(TRAINING))
    (estimate,) = recording.estimates
    assert (estimate.candidate_length, estimate.baseline_length) == (1.5, 1.25)
    assert (estimate.gain_low_percent, estimate.gain_percent, estimate.gain_high_percent) == (15.0, 20.0, 25.0)
    assert estimate.optimizer_steps == 40


def test_a_trainer_that_has_not_estimated_yet_has_no_estimate(recording: Recording) -> None:
    note_training(recording, parse("updraft_trainer_optimizer_steps_total 3\nupdraft_trainer_loss 2.0\n"))
    assert recording.estimates == []
    assert recording.optimizer_steps == 3


def test_decisions_of_the_registry_are_told_on_the_clock_of_the_run() -> None:
    entry = pb.Transition(unix_ms=1_500, version=2, to_phase=pb.PHASE_ROLLED_BACK, reason="worse", actor="fleet")
    told = transition(entry, 1.0)
    assert (told.at_s, told.version, told.phase, told.reason) == (0.5, 2, "rolled back", "worse")

"""Training from a dataset: which draft is chosen, and going on after a kill."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.likeliest import show_likeliest
from tests.support.traces import TraceMaker
from torch import Tensor

from updraft_chassis.errors import Conflict, Exhausted
from updraft_chassis.progress import Progress
from updraft_draft import checkpoint, recordings
from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.gradients import StepReport
from updraft_trainer.learning.learner import Learner
from updraft_trainer.offline import training as module
from updraft_trainer.offline.dataset import Dataset, read_dataset
from updraft_trainer.offline.folders import Recording
from updraft_trainer.offline.training import OfflineTraining
from updraft_trainer.publishing.publish import Candidate
from updraft_trainer.states.state import States

NUM_STEPS = 17
"""Four epochs of the training requests in `folder`."""


class KilledError(Exception):
    pass


@pytest.fixture
def dataset(traces: TraceMaker, folder: Path) -> Dataset:
    return read_dataset([folder], traces.expected, lambda _: None)


@pytest.fixture
def run(tiny_target: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Run":
    monkeypatch.setattr(module, "MIN_STEPS", 8)
    monkeypatch.setattr(module, "SAVE_S", 0.0)
    monkeypatch.setattr(module, "SAVE_SHARE", float("inf"))
    return Run(tiny_target, dataset, tmp_path / "unfinished")


class Run:
    """Runs of one command, which may be killed at a report."""

    def __init__(self, target: Path, dataset: Dataset, folder: Path) -> None:
        self.target = read_head(target)
        self.dataset = dataset
        self.folder = folder
        self.reports: list[Progress] = []

    def __call__(self, kill: Callable[[Progress], bool] = lambda _: False, *, epochs: int = 4) -> Candidate:
        self.reports.clear()

        def report(progress: Progress) -> None:
            self.reports.append(progress)
            if kill(progress):
                raise KilledError

        return OfflineTraining(self.target, self.dataset, self.folder, epochs=epochs, report=report).run()

    def activities(self) -> list[str]:
        return list(dict.fromkeys(report.activity for report in self.reports))

    def steps(self) -> list[int]:
        return [report.done for report in self.reports if report.activity == "training"]


def weights(candidate: Candidate) -> dict[str, Tensor]:
    return dict(candidate.network.state_dict())


def test_few_requests_end_with_the_closed_form_and_that_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_STEPS", 1000)
    assert run().step == 0
    assert run.activities() == ["solving for first weights", "judging"]
    notes = [report.note for report in run.reports if report.note]
    assert notes == ["The draft stays in closed form: 17 optimizer steps are fewer than the 1,000 that make it better."]


def test_with_enough_requests_the_better_of_both_drafts_is_chosen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = run()
    assert run.steps() == list(range(NUM_STEPS + 1))
    monkeypatch.setattr(module, "MIN_STEPS", 1000)
    fitted = run()
    steps = [sum(pair.candidate_steps for pair in one.estimate.pairs) for one in (trained, fitted)]
    assert steps[0] <= steps[1]


def test_every_request_is_used_once_an_epoch(run: Run, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    train = Learner.train

    def watched(self: Learner, samples: list[Sample]) -> StepReport:
        used.extend(sample.trace_id for sample in samples)
        return train(self, samples)

    monkeypatch.setattr(Learner, "train", watched)
    run(epochs=6)
    assert {used.count(item.trace_id) for item in dataset.training} == {6}
    assert len(used) == 6 * len(dataset.training)


@pytest.mark.parametrize("step", [1, 6, NUM_STEPS])
def test_a_killed_run_goes_on_from_its_last_state_and_ends_with_the_same_draft(run: Run, step: int) -> None:
    whole = run()
    run.folder = run.folder.with_name("other")
    with pytest.raises(KilledError):
        run(lambda progress: progress.activity == "training" and progress.done == step)
    resumed = run()
    assert min(run.steps()) == step - 1, "the state of the step before was saved"
    notes = [report.note for report in run.reports if report.note]
    assert notes == ([f"Going on from step {step - 1} of {NUM_STEPS}."] if step > 1 else [])
    assert resumed.step == whole.step
    assert all(tensor.equal(weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_a_run_that_was_killed_while_it_judged_trains_no_step_again(run: Run) -> None:
    with pytest.raises(KilledError):
        run(lambda progress: progress.activity == "judging" and NUM_STEPS in run.steps())
    run()
    assert run.steps() == [NUM_STEPS]


def test_a_draft_that_was_written_in_part_is_solved_for_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run()
    run.folder = run.folder.with_name("other")

    def full(_network: object, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / checkpoint.WEIGHTS).write_bytes(b"half")
        raise Exhausted("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "save", full)
        with pytest.raises(Exhausted):
            run()
    again = run()
    assert again.step == whole.step
    assert all(tensor.equal(weights(again)[name]) for name, tensor in weights(whole).items())


@pytest.mark.parametrize("num_left", [1, 2])
def test_drafts_are_compared_by_the_requests_that_judged_both(
    run: Run, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, num_left: int
) -> None:
    """Traces that are removed during training do not make the trained draft look better."""
    assert len(dataset.held_out) == 3
    steps, num_steps = iter((0, NUM_STEPS)), iter([4, 4, 4, *[5] * num_left])
    monkeypatch.setattr(module, "verify_steps", lambda _, samples, **__: [next(num_steps) for _ in samples])
    monkeypatch.setattr(OfflineTraining, "_drafts", lambda _: ((step, object()) for step in steps))

    def remove(progress: Progress) -> bool:
        if progress.activity == "judging" and progress.done == 2:  # the first draft's last judge
            for item in dataset.held_out[: 3 - num_left]:
                assert isinstance(item.trace, Recording)
                recordings.path(item.trace.folder, item.trace.name).unlink(missing_ok=True)
        return False

    assert run(remove).step == 0
    assert len(dataset.gone) == 3 - num_left


def test_a_run_whose_judges_are_all_removed_ends_with_a_sentence(run: Run, dataset: Dataset) -> None:
    def remove(progress: Progress) -> bool:
        if progress.activity == "training":
            for item in dataset.held_out:
                assert isinstance(item.trace, Recording)
                recordings.path(item.trace.folder, item.trace.name).unlink(missing_ok=True)
        return False

    with pytest.raises(Conflict, match="no held-out trace can be read any more: train from a copy of the folder"):
        run(remove)


def test_a_draft_in_closed_form_that_a_power_failure_cut_off_is_solved_for_again(run: Run) -> None:
    whole = run()
    (weights_file,) = run.folder.glob("*/closed-form/model.safetensors")
    weights_file.write_bytes(weights_file.read_bytes()[:100])
    assert run().step == whole.step


@pytest.mark.parametrize("changed", ["epochs", "requests"])
def test_another_run_does_not_go_on_from_a_state_and_removes_it(
    run: Run, traces: TraceMaker, folder: Path, changed: str
) -> None:
    with pytest.raises(KilledError):
        run(lambda progress: progress.activity == "training" and progress.done == 6)
    (run.folder / "mine").mkdir()
    if changed == "requests":
        recordings.write(folder, "new", traces.trace(3, rule=1))
        run.dataset = read_dataset([folder], traces.expected, lambda _: None)
    run(epochs=8 if changed == "epochs" else 4)
    assert run.steps()[0] == 0
    assert len(list(run.folder.iterdir())) == 2, "this run's and somebody else's"


def test_another_run_that_ends_before_it_has_saved_anything_spares_the_state_of_the_one_before(run: Run) -> None:
    run()
    with pytest.raises(KilledError):
        run(lambda progress: progress.activity == "solving for first weights", epochs=8)
    run()
    assert run.steps() == [NUM_STEPS], "no step was repeated"


@pytest.mark.parametrize("tells_logits", [True, False])
def test_only_traces_that_tell_no_logits_train_from_random_weights(
    run: Run, tiny_target: Path, traces: TraceMaker, tmp_path: Path, *, tells_logits: bool
) -> None:
    for number in range(24):
        trace = show_likeliest(traces.trace(number), read_head(tiny_target).head, k=8)
        if not tells_logits:
            trace.payload.top_k.ClearField("log_sum_exp")
        recordings.write(tmp_path / "likeliest", f"{number}", trace)
    run.dataset = read_dataset([tmp_path / "likeliest"], traces.expected, lambda _: None)

    assert run().step == (0 if tells_logits else run.steps()[-1])


def test_a_finished_run_leaves_nothing_and_spares_what_is_not_its_own(run: Run) -> None:
    (run.folder / "mine").mkdir(parents=True)
    training = OfflineTraining(run.target, run.dataset, run.folder, epochs=4, report=lambda _: None)
    training.run()
    training.clean()
    assert [path.name for path in run.folder.iterdir()] == ["mine"]
    (run.folder / "mine").rmdir()
    training.clean()
    assert not run.folder.exists()


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save, count = States.save, iter(range(100))

    def sometimes(self: States, state: object) -> object:
        if next(count) == 5:
            raise Exhausted("cannot save")
        return save(self, state)  # type: ignore[arg-type]

    monkeypatch.setattr(States, "save", sometimes)
    with pytest.raises(Exhausted, match="cannot save"):
        run()
    run()
    assert run.steps()[0] == 5

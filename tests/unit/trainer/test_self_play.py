"""A draft from recordings of self-play, without a registry."""

from pathlib import Path

import pytest
from google.protobuf import json_format
from tests.support.disk import age, file_size_limit
from tests.support.traces import TraceMaker

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.digests import file_digest
from updraft_chassis.errors import Exhausted, InvalidInput, NotFound
from updraft_chassis.progress import Progress
from updraft_draft import checkpoint, recordings
from updraft_draft.target_weights import read_head
from updraft_trainer import self_play
from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.publishing.estimate import verify_steps
from updraft_trainer.publishing.publish import snapshot


@pytest.fixture
def folder(traces: TraceMaker, tmp_path: Path) -> Path:
    for number in range(24):
        recordings.write(tmp_path / "recordings", number, traces.trace(number))
    return tmp_path / "recordings"


def samples(traces: TraceMaker, seeds: range) -> list[Sample]:
    return [read_sample(traces.data(seed), traces.expected) for seed in seeds]


def test_the_draft_is_a_folder_whose_manifest_names_its_target_and_its_origin(
    tiny_target: Path, traces: TraceMaker, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "draft"
    self_play.train(tiny_target, folder, 24, output, lambda _: None)

    checkpoint.load(output)
    manifest = json_format.Parse((output / "manifest.json").read_text(), registry_pb2.Manifest())
    assert manifest.target_fingerprint == traces.target_fingerprint
    assert manifest.digest == file_digest(output / checkpoint.WEIGHTS)
    assert manifest.provenance.code_version.startswith("self-play by updraft/")
    steps = [(one.candidate_steps, one.tokens) for one in manifest.evaluation.samples]
    num_texts = len({tuple(traces.trace(number).output_ids) for number in range(24)})
    assert len(steps) == num_texts // 8, "one of eight judges"
    assert (manifest.provenance.samples, manifest.provenance.step) == (num_texts - len(steps), 0)
    assert sum(mine for mine, _ in steps) < sum(tokens for _, tokens in steps) / 1.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "recordings"]


def test_few_requests_end_with_the_closed_form(tiny_target: Path, traces: TraceMaker) -> None:
    reports: list[Progress] = []
    training = samples(traces, range(16))
    self_play.choose(read_head(tiny_target), training, samples(traces, range(100, 104)), reports.append)
    assert "training" not in {one.activity for one in reports}


def test_enough_requests_train_on_and_the_held_out_ones_choose(
    tiny_target: Path, traces: TraceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_play, "MIN_STEPS", 16)
    reports: list[Progress] = []
    training, held_out = samples(traces, range(16)), samples(traces, range(100, 104))
    target = read_head(tiny_target)
    best = self_play.choose(target, training, held_out, reports.append)
    assert [one.done for one in reports if one.activity == "training"] == list(range(16))

    drafts = dict(self_play._drafts(target, training, lambda _: None))
    assert set(drafts) == {0, 16}
    num_steps = {step: sum(verify_steps(snapshot(one), held_out, lookahead=3)) for step, one in drafts.items()}
    assert sum(pair.candidate_steps for pair in best.estimate.pairs) <= min(num_steps.values())


def test_every_request_is_used_equally_often(traces: TraceMaker) -> None:
    used = [sample.trace_id for batch in self_play._batches(samples(traces, range(6))) for sample in batch]
    assert {used.count(trace_id) for trace_id in used} == {self_play.USES}


def test_the_same_text_is_not_learned_and_held_out(tiny_target: Path, traces: TraceMaker, tmp_path: Path) -> None:
    for number in range(40):
        recordings.write(tmp_path / "same", number, traces.trace(number % 3))
    with pytest.raises(InvalidInput) as refused:
        self_play.train(tiny_target, tmp_path / "same", 40, tmp_path / "draft", lambda _: None)
    assert str(refused.value) == (
        f"{tmp_path}/same holds 3 recordings that can be learned from, fewer than 16 (no other text is there):"
        " name a larger --self-play"
    )
    assert not (tmp_path / "draft").exists()


def test_a_recording_that_is_missing_or_broken_stops_it(tiny_target: Path, folder: Path, tmp_path: Path) -> None:
    recordings.path(folder, 5).unlink()
    recordings.path(folder, 7).write_bytes(b"broken")
    with pytest.raises(NotFound, match=r"holds 22 of 24 recordings: `updraft draft train` makes the others"):
        self_play.train(tiny_target, folder, 24, tmp_path / "draft", lambda _: None)


def test_recordings_that_nothing_can_learn_from_are_named(
    tiny_target: Path, traces: TraceMaker, tmp_path: Path
) -> None:
    for number in range(20):
        recordings.write(tmp_path / "light", number, traces.trace(number, payload=False))
    with pytest.raises(InvalidInput, match=r"holds 0 recordings .*\(the trace carries no hidden states\)"):
        self_play.train(tiny_target, tmp_path / "light", 20, tmp_path / "draft", lambda _: None)


def test_a_full_disk_leaves_no_draft(tiny_target: Path, folder: Path, tmp_path: Path) -> None:
    with file_size_limit(10_000), pytest.raises(Exhausted, match="the draft cannot be written"):
        self_play.train(tiny_target, folder, 24, tmp_path / "draft", lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["recordings"]


def test_the_draft_that_a_killed_run_was_writing_is_removed_by_the_next_run_for_this_output(
    tiny_target: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[Path] = []

    def killed(_candidate: object, part: Path, *_: object) -> None:
        parts.append(part)
        raise InvalidInput("killed")

    monkeypatch.setattr(self_play, "save", killed)
    with pytest.raises(InvalidInput, match="killed"):
        self_play.train(tiny_target, folder, 24, tmp_path / "draft [1]", lambda _: None)
    (part,) = parts
    part.mkdir(parents=True)
    (part / "model.safetensors").touch()
    for hours, remains in ((0.9, True), (1.1, False)):
        age(part.parent, hours=hours)
        with pytest.raises(NotFound):
            self_play.train(tiny_target, folder, 25, tmp_path / "draft [1]", lambda _: None)
        assert part.parent.exists() == remains


def test_a_folder_with_a_similar_name_is_left_alone(tiny_target: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "draft.part").mkdir()
    (tmp_path / "draft.part" / "mine").touch()
    self_play.train(tiny_target, folder, 24, tmp_path / "draft", lambda _: None)
    assert (tmp_path / "draft.part" / "mine").exists()

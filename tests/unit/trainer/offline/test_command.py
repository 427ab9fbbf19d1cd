"""From folders of traces to a draft folder: what is written, and what is left when that fails."""

from pathlib import Path

import pytest
from google.protobuf import json_format
from tests.support.disk import age, file_size_limit
from tests.support.traces import TraceMaker

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.digests import file_digest
from updraft_chassis.errors import Exhausted, InvalidInput
from updraft_chassis.progress import Progress
from updraft_draft import checkpoint, recordings
from updraft_trainer.offline import command
from updraft_trainer.offline.command import OfflineOptions, train
from updraft_trainer.offline.dataset import Dataset, read_dataset
from updraft_trainer.offline.folders import Recording


def run(target: Path, folder: Path, output: Path) -> list[Progress]:
    """Train, and return the reports."""
    reports: list[Progress] = []
    train(target, [folder], output, OfflineOptions(epochs=4, origin="answers to questions.jsonl"), reports.append)
    return reports


def test_the_draft_is_a_folder_whose_manifest_names_its_target_and_its_origin(
    tiny_target: Path, traces: TraceMaker, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "draft"
    run(tiny_target, folder, output)

    checkpoint.load(output)
    manifest = json_format.Parse((output / "manifest.json").read_text(), registry_pb2.Manifest())
    assert manifest.target_fingerprint == traces.target_fingerprint
    assert manifest.digest == file_digest(output / checkpoint.WEIGHTS)
    assert manifest.provenance.origin == "answers to questions.jsonl"
    assert manifest.provenance.code_version.startswith("draft train of updraft/")
    steps = [(one.candidate_steps, one.tokens) for one in manifest.evaluation.samples]
    num_texts = len({tuple(traces.trace(number).output_ids) for number in range(24)})
    assert len(steps) == -(-num_texts // 8), "one of eight judges"
    assert (manifest.provenance.samples, manifest.provenance.step) == (num_texts - len(steps), 0)
    assert sum(mine for mine, _ in steps) < sum(tokens for _, tokens in steps) / 1.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "recordings"]


def test_the_manifest_lists_whose_traces_the_draft_learned_from(
    tiny_target: Path, traces: TraceMaker, tmp_path: Path
) -> None:
    for number in range(24):
        tenant = 9 if number in {3, 10} else 2 - number % 2
        trace = traces.trace(number, tenant=tenant, evaluation=number in {3, 10})
        recordings.write(tmp_path / "recordings", f"{number:02}", trace)
    run(tiny_target, tmp_path / "recordings", tmp_path / "draft")

    manifest = json_format.Parse((tmp_path / "draft" / "manifest.json").read_text(), registry_pb2.Manifest())
    assert list(manifest.provenance.tenants) == [1, 2], "held-out requests judge drafts, and teach none"
    assert not manifest.provenance.has_more_tenants


def test_a_damaged_recording_is_told_and_stops_nothing(tiny_target: Path, folder: Path, tmp_path: Path) -> None:
    recordings.path(folder, "07").write_bytes(b"broken")
    notes = [report.note for report in run(tiny_target, folder, tmp_path / "draft") if report.note]
    assert "1 not used because it is damaged" in notes[0]
    assert (tmp_path / "draft").is_dir()


def test_traces_that_are_removed_during_the_run_are_told_and_are_not_in_its_provenance(
    tiny_target: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Dataset] = []

    def and_remove_two(*arguments: object) -> Dataset:
        dataset = read_dataset(*arguments)  # type: ignore[arg-type]
        for item in (dataset.training[0], dataset.held_out[0]):
            assert isinstance(item.trace, Recording)
            recordings.path(folder, item.trace.name).unlink()
        found.append(dataset)
        return dataset

    monkeypatch.setattr(command, "read_dataset", and_remove_two)
    notes = [report.note for report in run(tiny_target, folder, tmp_path / "draft") if report.note]
    assert notes[-1] == "2 traces were removed or damaged meanwhile."
    manifest = json_format.Parse((tmp_path / "draft" / "manifest.json").read_text(), registry_pb2.Manifest())
    (dataset,) = found
    assert manifest.provenance.samples == len(dataset.training) - 1
    assert manifest.provenance.first_trace_id == dataset.training[1].trace_id
    assert len(manifest.evaluation.samples) == len(dataset.held_out) - 1


def test_a_full_disk_leaves_no_draft_and_what_the_next_run_goes_on_from(
    tiny_target: Path, folder: Path, tmp_path: Path
) -> None:
    with file_size_limit(10_000), pytest.raises(Exhausted, match="the draft cannot be written"):
        run(tiny_target, folder, tmp_path / "draft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft-unfinished", "recordings"]
    run(tiny_target, folder, tmp_path / "draft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "recordings"]


def test_the_draft_that_a_killed_run_was_writing_is_removed_by_the_next_run_for_this_output(
    tiny_target: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[Path] = []

    def killed(_candidate: object, part: Path, *_: object) -> None:
        parts.append(part)
        raise InvalidInput("killed")

    monkeypatch.setattr(command, "save", killed)
    with pytest.raises(InvalidInput, match="killed"):
        run(tiny_target, folder, tmp_path / "draft [1]")
    (part,) = parts
    part.mkdir(parents=True)
    (part / "model.safetensors").touch()
    for hours, remains in ((0.9, True), (1.1, False)):
        age(part.parent, hours=hours)
        with pytest.raises(InvalidInput, match="holds no traces"):
            run(tiny_target, tmp_path / "none", tmp_path / "draft [1]")
        assert part.parent.exists() == remains


def test_a_folder_with_a_similar_name_is_left_alone(tiny_target: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "draft.part").mkdir()
    (tmp_path / "draft.part" / "mine").touch()
    run(tiny_target, folder, tmp_path / "draft")
    assert (tmp_path / "draft.part" / "mine").exists()

"""`updraft-trainer offline`: from folders of traces to a draft folder, all or nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_artifacts.transfer import MANIFEST
from updraft_chassis import lifecycle, logs
from updraft_chassis.errors import Conflict, Exhausted
from updraft_chassis.leftovers import remove_stale
from updraft_chassis.progress import Progress, Report
from updraft_chassis.tenants import hashes
from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import ExpectedTarget
from updraft_trainer.offline.dataset import Dataset, read_dataset, refusals
from updraft_trainer.offline.training import OfflineTraining
from updraft_trainer.publishing.publish import Candidate, save
from updraft_trainer.states.state import Identity, TrainingHistory

_PART = ".part"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    epochs: int
    """How often each request is trained on."""
    origin: str
    """Where the traces come from, in words."""
    region: str = ""
    """Where this machine is; some traces may not leave their region."""


def main(model: Path, folders: Sequence[Path], output: Path, options: OfflineOptions, report: Report) -> None:
    logs.configure(process="trainer", level="ERROR", format="text")
    with lifecycle.errors_as_sentences("updraft-trainer"):
        train(model, folders, output, options, report)


def train(model: Path, folders: Sequence[Path], output: Path, options: OfflineOptions, report: Report) -> None:
    """Train on the traces in `folders`; write weights, config and manifest to `output`.

    A killed run leaves a folder next to `output`, from which the next run goes on.
    """
    remove_stale(output.parent.glob(f".{escape(output.name)}-*{_PART}"))  # of runs that were killed
    target = read_head(model)
    expected = ExpectedTarget.of(
        target.config,
        target_fingerprint=target_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(model),
        region=options.region,
    )
    dataset = read_dataset(folders, expected, report)
    if dataset.refused:
        report(Progress(activity="reading traces", done=1, total=1, note=f"Traces: {refusals(dataset.refused)}."))
    unfinished = output.with_name(f"{output.name}-unfinished")
    training = OfflineTraining(target, dataset, unfinished, epochs=options.epochs, report=report)
    candidate = training.run()
    if dataset.gone:
        note = f"{len(dataset.gone):,} traces were removed or damaged meanwhile."
        report(Progress(activity="judging", done=1, total=1, note=note))
    _write(candidate, output, training.identity, _provenance(dataset, candidate, options.origin))
    training.clean()


def _provenance(dataset: Dataset, candidate: Candidate, origin: str) -> registry_pb2.Provenance:
    trained = [item.trace_id for item in dataset.training if item.trace_id not in dataset.gone]
    if not trained:
        raise Conflict("no trace to train on can be read any more: train from a copy of the folder")
    history = TrainingHistory()
    for item in dataset.training:  # also those that are gone: an earlier run may have learned from them
        history.learn_from(item.tenants)
    return registry_pb2.Provenance(
        samples=len(trained),
        first_trace_id=trained[0],
        last_trace_id=trained[-1],
        step=candidate.step,
        code_version=f"draft train of updraft/{installed_version('updraft')}",
        created_unix_ms=int(time.time() * 1000),
        origin=origin,
        tenants=map(hashes.parse, history.tenants),
        has_more_tenants=history.has_more_tenants,
    )


def _write(candidate: Candidate, output: Path, identity: Identity, provenance: registry_pb2.Provenance) -> None:
    try:
        with TemporaryDirectory(prefix=f".{output.name}-", suffix=_PART, dir=output.parent) as scratch:
            part = Path(scratch) / output.name
            manifest = save(candidate, part, identity, provenance)
            (part / MANIFEST).write_text(json_format.MessageToJson(manifest, preserving_proto_field_name=True))
            part.replace(output)
    except OSError as error:
        raise Exhausted(f"the draft cannot be written to {output}: {error.strerror or error}") from error

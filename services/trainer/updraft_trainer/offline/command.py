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
from updraft_chassis.errors import Exhausted
from updraft_chassis.leftovers import remove_stale
from updraft_chassis.progress import Progress, Report
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.sample import ExpectedTarget
from updraft_trainer.learning.state import Identity
from updraft_trainer.offline.dataset import Dataset, read_dataset, refusals
from updraft_trainer.offline.training import OfflineTraining
from updraft_trainer.publishing.publish import Candidate, save

_PART = ".part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the traces come from, in words, and the region of this machine, which some may not leave."""

    origin: str
    region: str = ""


def main(model: Path, folders: Sequence[Path], output: Path, epochs: int, source: Source, report: Report) -> None:
    logs.configure(process="trainer", level="ERROR", format="text")
    with lifecycle.errors_as_sentences("updraft-trainer"):
        train(model, folders, output, epochs, source, report)


def train(model: Path, folders: Sequence[Path], output: Path, epochs: int, source: Source, report: Report) -> None:
    """Train on the traces in `folders`; write weights, config and manifest to `output`.

    Each request is trained on `epochs` times. What a killed run leaves is in a folder next to `output`,
    from which the next run goes on.
    """
    remove_stale(output.parent.glob(f".{escape(output.name)}-*{_PART}"))  # of runs that were killed
    target = read_head(model)
    expected = _expected(model, target, source.region)
    dataset = read_dataset(folders, expected, report)
    if dataset.refused:
        report(Progress(activity="reading traces", done=1, total=1, note=f"Traces: {refusals(dataset.refused)}."))
    unfinished = output.with_name(f"{output.name}-unfinished")
    training = OfflineTraining(target, dataset, unfinished, epochs=epochs, report=report)
    candidate = training.run()
    _write(candidate, output, training.identity, _provenance(dataset, candidate, source.origin))
    training.clean()


def _expected(model: Path, target: TargetHead, region: str) -> ExpectedTarget:
    c = target.config
    return ExpectedTarget(
        target_fingerprint=target_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(model),
        aux_size=len(c.aux_layers) * c.hidden_size,
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        region=region,
    )


def _provenance(dataset: Dataset, candidate: Candidate, origin: str) -> registry_pb2.Provenance:
    training = dataset.training
    return registry_pb2.Provenance(
        samples=len(training),
        first_trace_id=training[0].trace_id,
        last_trace_id=training[-1].trace_id,
        step=candidate.step,
        code_version=f"draft train of updraft/{installed_version('updraft')}",
        created_unix_ms=int(time.time() * 1000),
        origin=origin,
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

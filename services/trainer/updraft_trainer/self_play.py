"""Trains a first draft from recorded requests that the target made up, without a registry (ADR 0033).

First in closed form. Gradient steps follow if the requests suffice for `MIN_STEPS`, because fewer make the draft worse.
Held-out requests choose between both.
"""

import random
import time
from collections.abc import Iterator, Sequence
from glob import escape
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_artifacts.transfer import MANIFEST
from updraft_chassis import lifecycle, logs
from updraft_chassis.errors import Exhausted, InvalidInput, NotFound
from updraft_chassis.leftovers import remove_stale
from updraft_chassis.progress import Progress, Report
from updraft_draft import recordings
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import ExpectedTarget, RefusedTrace, Sample, read_sample
from updraft_trainer.data.selection import TrafficMix
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.learning.state import Identity
from updraft_trainer.publishing.estimate import compare, verify_steps
from updraft_trainer.publishing.publish import Candidate, save, snapshot

LOOKAHEAD = 3
BATCH = 4
USES = 4
MIN_STEPS = 200
JUDGE_EVERY = 8
"""One request of so many is held out."""
MIN_SAMPLES = 2 * JUDGE_EVERY

_PART = ".part"


def main(model: Path, folder: Path, count: int, output: Path, report: Report) -> None:
    logs.configure(process="trainer", level="ERROR", format="text")
    with lifecycle.errors_as_sentences("updraft-trainer"):
        train(model, folder, count, output, report)


def train(model: Path, folder: Path, count: int, output: Path, report: Report) -> None:
    """Train on the first `count` recordings of a folder; write weights, config and manifest to `output`, all or nothing."""
    remove_stale(output.parent.glob(f".{escape(output.name)}-*{_PART}"))  # of runs that were killed
    identity = Identity(
        speculator="",
        target_fingerprint=target_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(model),
    )
    target = read_head(model)
    samples = _samples(folder, count, identity, target)
    held_out = samples[JUDGE_EVERY - 1 :: JUDGE_EVERY]
    training = [sample for n, sample in enumerate(samples) if n % JUDGE_EVERY != JUDGE_EVERY - 1]
    candidate = choose(target, training, held_out, report)
    provenance = registry_pb2.Provenance(
        samples=len(training),
        first_trace_id=training[0].trace_id,
        last_trace_id=training[-1].trace_id,
        step=candidate.step,
        code_version=f"self-play by updraft/{installed_version('updraft')}",
        created_unix_ms=int(time.time() * 1000),
        origin="self-play",
    )
    _write(candidate, output, identity, provenance)


def choose(target: TargetHead, training: Sequence[Sample], held_out: Sequence[Sample], report: Report) -> Candidate:
    """The draft that needs the fewest verify steps for the held-out samples."""
    drafts = {step: snapshot(draft) for step, draft in _drafts(target, training, report)}
    report(Progress(activity="judging", done=0, total=1))
    steps = {step: verify_steps(draft, held_out, lookahead=LOOKAHEAD) for step, draft in drafts.items()}
    best = min(steps, key=lambda step: sum(steps[step]))
    return Candidate(
        network=drafts[best],
        step=best,
        estimate=compare(held_out, steps[best], None, TrafficMix()),
        baseline_version=0,
        lookahead=LOOKAHEAD,
    )


def _drafts(target: TargetHead, training: Sequence[Sample], report: Report) -> Iterator[tuple[int, DraftNetwork]]:
    """Drafts, and their optimizer steps: the closed form, and what training makes of it."""
    config = target.draft()
    token_ids = choose_vocabulary(training, target, size=config.draft_vocab_size)
    learner = Learner(target, config, token_ids, Hyperparameters())
    report(Progress(activity="solving for first weights", done=0, total=1))
    first = learner.closed_form(training)
    if first is not None:
        learner.start_from(first.state_dict())
        yield 0, first
    batches = list(_batches(training))
    if first is None or len(batches) >= MIN_STEPS:
        for step, batch in enumerate(batches):
            report(Progress(activity="training", done=step, total=len(batches)))
            learner.train(batch)
        yield learner.step, learner.average


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Each sample `USES` times, in random order."""
    rng = random.Random(0)
    order = [sample for _ in range(USES) for sample in rng.sample(samples, len(samples))]
    return (order[n : n + BATCH] for n in range(0, len(order), BATCH))


def _samples(folder: Path, count: int, identity: Identity, target: TargetHead) -> list[Sample]:
    """Recordings that can be trained on, each text once. NotFound if one is missing."""
    c = target.config
    expected = ExpectedTarget(
        target_fingerprint=identity.target_fingerprint,
        tokenizer_fingerprint=identity.tokenizer_fingerprint,
        aux_size=len(c.aux_layers) * c.hidden_size,
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
    )
    samples: dict[tuple[int, ...], Sample] = {}
    reason = "no other text is there"
    num_recorded = 0
    for number in range(count):
        data = recordings.read(folder, number, target_fingerprint=identity.target_fingerprint)
        if data is None:
            continue
        num_recorded += 1
        try:
            sample = read_sample(data, expected)
        except RefusedTrace as error:
            reason = str(error)
        else:
            samples.setdefault(tuple(sample.ids.tolist()), sample)
    if num_recorded < count:
        raise NotFound(f"{folder} holds {num_recorded} of {count} recordings: `updraft draft train` makes the others")
    if len(samples) < MIN_SAMPLES:
        raise InvalidInput(
            f"{folder} holds {len(samples)} recordings that can be learned from, fewer than {MIN_SAMPLES} ({reason}):"
            " name a larger --self-play"
        )
    return list(samples.values())


def _write(candidate: Candidate, output: Path, identity: Identity, provenance: registry_pb2.Provenance) -> None:
    try:
        with TemporaryDirectory(prefix=f".{output.name}-", suffix=_PART, dir=output.parent) as scratch:
            part = Path(scratch) / output.name
            manifest = save(candidate, part, identity, provenance)
            (part / MANIFEST).write_text(json_format.MessageToJson(manifest, preserving_proto_field_name=True))
            part.replace(output)
    except OSError as error:
        raise Exhausted(f"the draft cannot be written to {output}: {error.strerror or error}") from error

"""Batches of SmolLM2's recorded answers, for learners in processes of their own.

What is written is plain tensors, so that a process with an earlier commit's packages can read it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import harness
from bench.learning.recorder import Recorder

from updraft_cli.local.folders import cache_folder
from updraft_draft.target_weights import read_head
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import LastHidden

KINDS = ("math", "code", "chat", "sql")


def recorded(num_batches: int) -> list[list[Sample]]:
    """Batches of one answer of each kind, see bench/learning."""
    folder = harness.model()
    recorder = Recorder(folder, cache_folder(os.environ) / "learning", read_head(folder))
    recorder.record(KINDS, num_batches, 0)
    of_kinds = [recorder.samples(kind, num_batches, held_out=False) for kind in KINDS]
    return [list(batch) for batch in zip(*of_kinds, strict=True)]


def write(batches: Sequence[Sequence[Sample]], file: Path) -> None:
    torch.save([[_plain(sample) for sample in batch] for batch in batches], file)


def _plain(sample: Sample) -> dict[str, object]:
    assert isinstance(sample.teacher, LastHidden)
    names = ("ids", "first_output", "first_teacher_row", "corrections")
    return {"states": sample.teacher.states, "aux": sample.aux.decoded()} | {
        name: getattr(sample, name) for name in names
    }

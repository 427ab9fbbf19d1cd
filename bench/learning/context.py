"""Context that a draft needs: `python -m bench.learning.context`.

A draft learns from SmolLM2's recorded answers with all the context that serving gave it. It is then judged on the last 128
tokens of long answers by which it was not trained, with only so many rows of context before them, at positions from 0 on, as a
chunk of a long request has them (ADR 0039).
"""

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from bench import harness
from bench.harness import Measurements
from bench.learning.recorder import Recorder

from updraft_cli import output
from updraft_cli.local.folders import cache_folder
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import verify_steps

KINDS = ("math", "code", "chat", "sql")
JUDGED = 128
"""Tokens at the end of a long answer."""
WINDOWS = (8, 24, 85, 256)
"""Rows of context. A chunk repeats 24 rows at a width of 7,168, and 85 at 2,048."""
LOOKAHEAD = 3
BATCH = 4
FITTED = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=24, help="of each kind")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    harness.run("context", parser, measure)


def measure(arguments: argparse.Namespace) -> Measurements:
    torch.set_num_threads(arguments.threads)
    folder = harness.model()
    target = read_head(folder)
    recorder = Recorder(folder, cache_folder(os.environ) / "learning", target)
    recorder.record(KINDS, arguments.requests, 0)
    samples = [one for kind in KINDS for one in recorder.samples(kind, arguments.requests, held_out=False)]
    long = [one for one in samples if one.num_rows - one.first_output >= JUDGED + WINDOWS[-1]]
    lessons = [one for one in samples if one.num_rows - one.first_output < JUDGED + WINDOWS[-1]]
    draft = _taught(target, lessons, arguments.steps)
    steps = {str(rows): verify_steps(draft, [_cut(one, rows) for one in long], lookahead=LOOKAHEAD) for rows in WINDOWS}
    steps["all"] = verify_steps(draft, [_cut(one, one.num_rows - JUDGED) for one in long], lookahead=LOOKAHEAD)
    table = output.table(
        f"last {JUDGED} tokens of {len(long)} answers", ">acceptance length", ">quartiles of steps over those with all"
    )
    for name, of_answers in steps.items():
        ratio = harness.spread(mine / whole for mine, whole in zip(of_answers, steps["all"], strict=True))
        table.add_row(f"{name} rows", f"{JUDGED * len(long) / sum(of_answers):.3f}", str(ratio))
    return Measurements(
        seed=0, lines=[], samples=[{"rows": name, "steps": one} for name, one in steps.items()], figures=[table]
    )


def _taught(target: TargetHead, lessons: Sequence[Sample], num_steps: int) -> DraftNetwork:
    """The averaged draft after steps on batches drawn at random, from the closed form of some of the lessons on."""
    rng, config = random.Random(0), target.draft()
    token_ids = choose_vocabulary(lessons, target, size=config.draft_vocab_size)
    learner = Learner(target, config, token_ids, Hyperparameters())
    draft = learner.closed_form(rng.sample(lessons, FITTED))
    assert draft is not None, "recorded answers have hidden states"
    learner.start_from_fit(draft)
    for _ in range(num_steps):
        learner.train(rng.sample(lessons, BATCH))
    return learner.average


def _cut(sample: Sample, num_rows: int) -> Sample:
    """The last `JUDGED` tokens, after so many rows of context."""
    start = sample.num_rows - JUDGED - num_rows
    return replace(
        sample,
        aux=sample.aux[start:],
        ids=sample.ids[start:],
        corrections=sample.corrections[start:],
        first_output=num_rows,
        counterfactuals=(),
    )


if __name__ == "__main__":
    main()

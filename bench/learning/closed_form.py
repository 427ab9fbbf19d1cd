"""Measure the benefit and the cost of a draft in closed form: `python -m bench.learning.closed_form`.

No gradient step is taken. Acceptance length (lookahead 3) is measured on held-out requests of the kind; seconds are processor
time of one thread.
"""

import argparse
import random
import time
from collections.abc import Sequence

import torch
from bench import harness
from bench.learning import figures
from bench.learning.kinds import KINDS
from bench.learning.learning import SEED, open_recorder
from bench.learning.recorder import NUM_HELD_OUT
from bench.learning.replay import DRAFT_VOCAB, LOOKAHEAD

from updraft_cli import output
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import num_tokens, verify_steps
from updraft_trainer.publishing.publish import snapshot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["math", "sql"])
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 24, 56, 92], help="to fit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recorder, target = open_recorder(), read_head(harness.model())
    recorder.record(arguments.kinds, max(arguments.requests), NUM_HELD_OUT)
    table = output.table("kind", ">requests", ">acceptance length", ">seconds")
    for kind in arguments.kinds:
        held_out = recorder.samples(kind, NUM_HELD_OUT, held_out=True)
        samples = recorder.samples(kind, max(arguments.requests), held_out=False)
        random.Random(f"{kind}/{SEED}").shuffle(samples)
        for number in arguments.requests:
            length, seconds = _measured(samples[:number], held_out, target)
            table.add_row(kind, str(number), str(length), f"{seconds:.1f}")
    output.console().print(table)


def _measured(
    samples: Sequence[Sample], held_out: Sequence[Sample], target: TargetHead
) -> tuple[figures.Estimate, float]:
    token_ids = choose_vocabulary(samples, target, size=DRAFT_VOCAB)
    learner = Learner(target, target.draft(draft_vocab_size=len(token_ids)), token_ids, Hyperparameters(), seed=SEED)
    started = time.thread_time()
    draft = learner.closed_form(samples)
    seconds = time.thread_time() - started
    assert draft is not None  # recordings have hidden states
    steps = verify_steps(snapshot(draft), held_out, lookahead=LOOKAHEAD)
    return figures.acceptance_length([num_tokens(one) for one in held_out], [steps]), seconds


if __name__ == "__main__":
    main()

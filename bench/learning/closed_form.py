"""Measure the benefit and the cost of a draft in closed form: `python -m bench.learning.closed_form`.

No gradient step is taken. Acceptance length (lookahead 3) is measured on held-out requests of the kind; seconds are processor
time of one thread. Each draft is fitted twice: to the target's last hidden states, as the torch engine shows them, and to its
64 likeliest tokens, as SGLang and vLLM do.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from bench import harness
from bench.learning import figures
from bench.learning.kinds import KINDS
from bench.learning.learning import SEED, open_recorder
from bench.learning.recorder import NUM_HELD_OUT
from bench.learning.replay import DRAFT_VOCAB, LOOKAHEAD

from updraft_cli import output
from updraft_draft.precision import linear
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import LastHidden, TopK
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import num_tokens, verify_steps
from updraft_trainer.publishing.publish import snapshot

TOP_K = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["math", "sql"])
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 24, 56, 92], help="to fit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recorder, target = open_recorder(), read_head(harness.model())
    recorder.record(arguments.kinds, max(arguments.requests), NUM_HELD_OUT)
    table = output.table("kind", ">requests", ">hidden states", ">seconds", f">{TOP_K} likeliest", ">seconds")
    for kind in arguments.kinds:
        held_out = recorder.samples(kind, NUM_HELD_OUT, held_out=True)
        samples = recorder.samples(kind, max(arguments.requests), held_out=False)
        random.Random(f"{kind}/{SEED}").shuffle(samples)
        for number in arguments.requests:
            shown = [_with_likeliest(sample, target) for sample in samples[:number]]
            figures_of_both = (_measured(each, held_out, target) for each in (samples[:number], shown))
            cells = [cell for length, seconds in figures_of_both for cell in (str(length), f"{seconds:.1f}")]
            table.add_row(kind, str(number), *cells)
    output.console().print(table)


@torch.no_grad()
def _with_likeliest(sample: Sample, target: TargetHead) -> Sample:
    """The sample as a server would have sent it."""
    assert isinstance(sample.teacher, LastHidden)  # as all recordings
    logits = linear(sample.teacher.states, target.head).float()
    sums = logits.logsumexp(-1)
    likeliest = logits.topk(TOP_K)
    return replace(sample, teacher=TopK(likeliest.indices, likeliest.values - sums[:, None], sums))


def _measured(
    samples: Sequence[Sample], held_out: Sequence[Sample], target: TargetHead
) -> tuple[figures.Estimate, float]:
    token_ids = choose_vocabulary(samples, target, size=DRAFT_VOCAB)
    learner = Learner(target, target.draft(draft_vocab_size=len(token_ids)), token_ids, Hyperparameters(), seed=SEED)
    started = time.thread_time()
    draft = learner.closed_form(samples)
    seconds = time.thread_time() - started
    assert draft is not None  # each recording tells states or logits
    steps = verify_steps(snapshot(draft), held_out, lookahead=LOOKAHEAD)
    return figures.acceptance_length([num_tokens(one) for one in held_out], [steps]), seconds


if __name__ == "__main__":
    main()

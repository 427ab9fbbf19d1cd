"""Effects of the draft vocabulary's size: tokens that a draft cannot propose, acceptance length, and training time.

`python -m bench.learning.vocabulary`. In the first table the first requests of another kind chose the vocabulary, requests of
the kind, or both. The second compares drafts in closed form, and processor time of an optimizer step on one thread.
"""

import argparse
import time

import torch
from bench import harness
from bench.learning.kinds import TUNED
from bench.learning.learning import open_recorder
from bench.learning.recorder import NUM_HELD_OUT
from bench.learning.replay import DRAFT_VOCAB, FIRST_SAMPLES, LOOKAHEAD

from updraft_cli import output
from updraft_draft import vocabulary
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import num_tokens, verify_steps
from updraft_trainer.publishing.publish import snapshot

NUM_REQUESTS = 50
BATCH = 4
NUM_STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[DRAFT_VOCAB, 2 * DRAFT_VOCAB], help="tokens")
    parser.add_argument("--kinds", nargs="+", choices=TUNED, default=["code", "chat"], help="kinds of the second table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recorder, target = open_recorder(), read_head(harness.model())
    recorder.record(TUNED, NUM_REQUESTS, NUM_HELD_OUT)
    traffic = {kind: recorder.samples(kind, NUM_REQUESTS, held_out=False) for kind in TUNED}
    held_out = {kind: recorder.samples(kind, NUM_HELD_OUT, held_out=True) for kind in TUNED}
    for size in arguments.sizes:
        _print_unknown(traffic, held_out, target, size)
    table = output.table("kind", ">size", ">acceptance length", ">seconds of a step")
    for kind in arguments.kinds:
        for size in arguments.sizes:
            length, seconds = _price(traffic[kind], held_out[kind], target, size)
            table.add_row(kind, f"{size:,}", f"{length:.3f}", f"{seconds:.2f}")
    output.console().print(table)


def _print_unknown(
    traffic: dict[str, list[Sample]], held_out: dict[str, list[Sample]], target: TargetHead, size: int
) -> None:
    table = output.table(
        "kind", "other", f">{FIRST_SAMPLES} of the other", f">{NUM_REQUESTS} of the kind", f">{NUM_REQUESTS} of both"
    )
    table.title = f"output outside {size:,} tokens chosen by"
    for kind, other in zip(TUNED, [*TUNED[1:], TUNED[0]], strict=True):
        own, others = traffic[kind], traffic[other]
        outputs = [sample.ids[sample.first_output :] for sample in held_out[kind]]
        choices = (others[:FIRST_SAMPLES], own, [*own, *others])
        shares = (vocabulary.unknown_share(outputs, choose_vocabulary(one, target, size=size)) for one in choices)
        table.add_row(kind, other, *(f"{100 * share:.1f} %" for share in shares))
    output.console().print(table)


def _price(samples: list[Sample], held_out: list[Sample], target: TargetHead, size: int) -> tuple[float, float]:
    """Acceptance length of a draft in closed form, and processor seconds of an optimizer step."""
    token_ids = choose_vocabulary(samples, target, size=size)
    learner = Learner(target, target.draft(draft_vocab_size=len(token_ids)), token_ids, Hyperparameters())
    draft = learner.closed_form(samples)
    assert draft is not None  # recordings have hidden states
    steps = sum(verify_steps(snapshot(draft), held_out, lookahead=LOOKAHEAD))
    started = time.thread_time()
    for n in range(NUM_STEPS):
        learner.train(samples[BATCH * n : BATCH * (n + 1)])
    return sum(map(num_tokens, held_out)) / steps, (time.thread_time() - started) / NUM_STEPS


if __name__ == "__main__":
    main()

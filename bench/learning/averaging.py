"""The worth of averaged weights after a closed form: `python -m bench.learning.averaging`.

A draft in closed form of some requests is trained on the same requests. After so many steps its averages, which begin with the
closed form, are measured on the held-out requests of the kind, and so are the weights of the last step (decay 0).
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from bench import harness
from bench.learning import figures
from bench.learning.kinds import KEPT_OUT, KINDS
from bench.learning.learning import open_recorder
from bench.learning.recorder import NUM_HELD_OUT, Recorder
from bench.learning.replay import DRAFT_VOCAB, LOOKAHEAD

from updraft_cli import output
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import num_tokens, verify_steps
from updraft_trainer.publishing.publish import snapshot

BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["math", "sql", "logic"])
    parser.add_argument("--requests", type=int, default=48, help="requests of the kind to learn from")
    parser.add_argument("--steps", type=int, nargs="+", default=[30], help="optimizer steps after which to measure")
    parser.add_argument("--decays", type=float, nargs="+", default=[0.0, 0.95, 0.98], help="of the averages")
    parser.add_argument("--held-out", type=int, default=NUM_HELD_OUT, help="requests of the kind to measure on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recorder, target = open_recorder(), read_head(harness.model())
    recorder.record(arguments.kinds, arguments.requests, arguments.held_out)
    rows = output.table("kind", ">steps", *(f">decay {decay:g}" for decay in arguments.decays))
    rows.title = f"tokens per verify step, from a closed form of {arguments.requests} requests on"
    for kind in arguments.kinds:
        samples = _without_corrections(recorder, kind, arguments.requests)
        held_out = recorder.samples(kind, arguments.held_out, held_out=True)
        tokens = [num_tokens(one) for one in held_out]
        measured = averages(samples, held_out, target, arguments.steps, arguments.decays)
        for steps, by_decay in measured.items():
            lengths = (str(figures.acceptance_length(tokens, [one])) for one in by_decay)
            rows.add_row(f"{kind}{'*' if kind in KEPT_OUT else ''}", str(steps), *lengths)
    output.console().print(rows)


def averages(
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    target: TargetHead,
    measured_at: Sequence[int],
    decays: Sequence[float],
) -> Mapping[int, list[list[int]]]:
    """By steps, and then by decay: verify steps of each held-out request; 0 steps are the closed form."""
    token_ids = choose_vocabulary(samples, target, size=DRAFT_VOCAB)
    learner = Learner(target, target.draft(draft_vocab_size=len(token_ids)), token_ids, Hyperparameters())
    first = learner.closed_form(samples)
    assert first is not None, "recordings have hidden states"
    learner.start_from_fit(first)
    averaged, rng = [learner.network.copy() for _ in decays], random.Random(0)
    measured = {0: [verify_steps(snapshot(first), held_out, lookahead=LOOKAHEAD)] * len(decays)}
    for step in range(1, max(measured_at) + 1):
        learner.train(rng.sample(samples, BATCH))
        for draft, decay in zip(averaged, decays, strict=True):
            _follow(draft, learner.network, decay)
        if step in measured_at:
            measured[step] = [verify_steps(snapshot(draft), held_out, lookahead=LOOKAHEAD) for draft in averaged]
    return measured


@torch.no_grad()
def _follow(average: DraftNetwork, network: DraftNetwork, decay: float) -> None:
    for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
        if weight.requires_grad:
            mean.lerp_(weight, 1.0 - decay)


def _without_corrections(recorder: Recorder, kind: str, number: int) -> list[Sample]:
    """As before any draft has served."""
    samples = recorder.samples(kind, number, held_out=False)
    return [replace(one, corrections=torch.zeros_like(one.corrections)) for one in samples]


if __name__ == "__main__":
    main()

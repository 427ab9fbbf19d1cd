"""Drafts trained to convergence on recorded requests: where a shift starts from, and the ceiling of a kind."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.learning.replay import DRAFT_VOCAB, LOOKAHEAD

from updraft_draft import checkpoint, vocabulary
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import verify_steps
from updraft_trainer.publishing.publish import snapshot

BATCH = 4
MAX_USES = 12
EVALUATE_STEPS = 100
PATIENCE = 4
"""Estimates without a gain after which training ends."""
DEV_EVERY = 10
"""Share of the training requests that only chooses the best weights; held-out requests take no part."""


def converged(
    samples: Sequence[Sample], target: TargetHead, folder: Path, report: Callable[[int, int], None]
) -> DraftNetwork:
    """The best draft of these requests, trained once and kept in `folder`."""
    if not (folder / checkpoint.WEIGHTS).exists():
        part = folder.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        checkpoint.save(_train(samples, target, report), part)
        part.rename(folder)
    config, tensors = checkpoint.load(folder)
    return checkpoint.build(config, tensors, target.embedding)


def _train(samples: Sequence[Sample], target: TargetHead, report: Callable[[int, int], None]) -> DraftNetwork:
    dev, training = list(samples[::DEV_EVERY]), [s for n, s in enumerate(samples) if n % DEV_EVERY]
    token_ids = vocabulary.choose(
        (sample.ids for sample in training),
        always=target.config.eos_token_ids,
        vocab_size=target.config.vocab_size,
        size=DRAFT_VOCAB,
    )
    learner = Learner(target, target.draft(draft_vocab_size=len(token_ids)), token_ids, Hyperparameters())
    rng, num_steps = random.Random(0), MAX_USES * len(training) // BATCH
    best, fewest, patience = snapshot(learner.network), sum(len(s.ids) for s in dev), PATIENCE
    for step in range(1, num_steps + 1):
        learner.train(rng.sample(training, BATCH))
        report(step, num_steps)
        if step % EVALUATE_STEPS == 0:
            draft = snapshot(learner.network)
            steps = sum(verify_steps(draft, dev, lookahead=LOOKAHEAD))
            patience = PATIENCE if steps < fewest else patience - 1
            if steps < fewest:
                best, fewest = draft, steps
            if not patience:
                break
    return best

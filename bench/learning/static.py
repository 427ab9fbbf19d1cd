"""Drafts trained to convergence on recorded requests: where a shift starts from, and the ceiling of a kind.

Training starts from a closed form and judges averaged weights. From random weights it takes twice as many steps.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from bench.learning.replay import DRAFT_VOCAB, LOOKAHEAD

from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import verify_steps
from updraft_trainer.publishing.publish import snapshot

BATCH = 4
MAX_USES = 12
FITTED_SAMPLES = 128
EVALUATE_STEPS = 100
HYPER = Hyperparameters(adaptation_rate=3e-4)
"""Fixed, so that first drafts and ceilings stay the same when defaults change."""
PATIENCE = 4
"""Estimates without a gain after which training ends."""
HELD_OUT_EVERY = 10
"""One of so many training requests chooses the best weights, and another one only judges later drafts."""


class Split(NamedTuple):
    """Requests of a static draft: to train on, to choose the best weights, and to judge what replaces it."""

    learned: list[Sample]
    choosing: list[Sample]
    judging: list[Sample]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Self:
        """`samples` in a fixed order."""
        choosing, judging = samples[::HELD_OUT_EVERY], samples[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
        others = [one for n, one in enumerate(samples) if n % HELD_OUT_EVERY not in (0, HELD_OUT_EVERY // 2)]
        return cls(others, list(choosing), list(judging))


def recipe() -> str:
    """Identifies how such a draft is trained."""
    content = [
        BATCH,
        MAX_USES,
        FITTED_SAMPLES,
        EVALUATE_STEPS,
        PATIENCE,
        HELD_OUT_EVERY,
        DRAFT_VOCAB,
        HYPER,
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


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
    training, dev, _ = Split.of(samples)
    token_ids = choose_vocabulary(training, target, size=DRAFT_VOCAB)
    learner = Learner(target, target.draft(draft_vocab_size=len(token_ids)), token_ids, HYPER)
    rng, num_steps = random.Random(0), MAX_USES * len(training) // BATCH
    first = learner.closed_form(rng.sample(training, min(len(training), FITTED_SAMPLES)))
    if first is not None:
        learner.start_from_fit(first)
    best, fewest, patience = snapshot(learner.average), sum(len(s.ids) for s in dev), PATIENCE
    for step in range(1, num_steps + 1):
        learner.train(rng.sample(training, BATCH))
        report(step, num_steps)
        if step % EVALUATE_STEPS == 0:
            draft = snapshot(learner.average)
            steps = sum(verify_steps(draft, dev, lookahead=LOOKAHEAD))
            patience = PATIENCE if steps < fewest else patience - 1
            if steps < fewest:
                best, fewest = draft, steps
            if not patience:
                break
    return best

"""How often the target would write each of its tokens, from recorded requests: what a draft vocabulary is chosen by.

A few requests contain few of the tokens that similar ones will contain, but the target's predictions name them. Rejected:
counting the texts alone, which left two to three times as many tokens of later requests outside the vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from updraft_draft import vocabulary
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import DraftVocabulary

MAX_ROWS = 4096
"""Predictions that are read, evenly spaced: 2.5 s of one core for a target of D 576 with 49,152 tokens."""

LOGIT_ROWS = 128
"""Rows of the target's logits in memory at a time: 25 MB for 49,152 tokens, 78 MB for 151,936."""


def choose_vocabulary(
    samples: Sequence[Sample], target: TargetHead, *, size: int, check: Callable[[], None] = lambda: None
) -> Tensor:
    """The tokens that a draft for this traffic should propose: int64 [min(size, vocab)], ascending. `check` as for
    `token_counts`."""
    return vocabulary.choose(token_counts(samples, target, check), always=target.config.eos_token_ids, size=size)


@torch.no_grad()
def token_counts(samples: Sequence[Sample], target: TargetHead, check: Callable[[], None] = lambda: None) -> Tensor:
    """Occurrences in the texts plus expected occurrences by the target's predictions, float32 [vocab]. `check` is called before
    each part of the work, and may end it by an exception."""
    counts = vocabulary.count((sample.ids for sample in samples), target.config.vocab_size)
    return counts + _expected(samples, target, check)


def _expected(samples: Sequence[Sample], target: TargetHead, check: Callable[[], None]) -> Tensor:
    """The sum of the predictions of all rows, estimated from at most `MAX_ROWS` of them."""
    c = target.config
    stride = max(1, -(-sum(len(sample.teacher) for sample in samples) // MAX_ROWS))
    whole = DraftVocabulary.whole(target.head, logit_scale=c.logit_scale, logit_cap=c.logit_cap)
    expected = torch.zeros(c.vocab_size)
    for sample in samples:
        rows = range(0, len(sample.teacher), stride)
        for start in range(0, len(rows), LOGIT_ROWS):
            check()
            part = torch.tensor(rows[start : start + LOGIT_ROWS])
            expected += sample.teacher.at(part).log_p(whole).exp().sum(0)
    return stride * expected

"""One optimizer step of EAGLE-3 training-time test (arXiv 2503.01840, section 3.2) on a batch of samples.

Step j of the unrolled draft at row t predicts the token at t + 2 + j. Its teacher is the target's prediction at row t + 1 + j
(the last hidden state through the frozen head, or the most likely tokens), restricted to the draft vocabulary and
renormalised. Step j has the weight decay^j. Rows whose token replaced a rejected draft token have a higher weight, because the
draft was wrong there.

Weights and optimizer state are float32; forward and backward passes run in bfloat16 where the hardware supports it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from updraft_draft import vocabulary
from updraft_draft.config import DraftConfig
from updraft_draft.network import DraftNetwork, initial_network
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data import importance
from updraft_trainer.data.frequency import token_counts
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import DraftVocabulary
from updraft_trainer.learning import closed_form
from updraft_trainer.learning.batch import Batch, TrainingRows
from updraft_trainer.learning.losses import LOSSES, Loss, forward_kl

FORWARD_ROWS = 1024
"""Maximum rows of padded samples in one forward pass; a longer sample has a pass of its own."""

LOGIT_ROWS = 256
"""Rows of logits in memory at a time: 8 MB per float32 tensor over 8,192 tokens."""

MIN_DECAY, MAX_DECAY = 0.95, 0.98
"""Bounds of the decay of the averaged weights. They average over at most 50 steps, so that they follow a shift of traffic, and
over at least 20 after a start from a good draft, whose acceptance falls during the first steps."""

MIN_MORE_TOKENS = 0.01
"""Share of the traffic's tokens that another vocabulary must add. Each change makes the next version larger to download."""

MAX_BAD_STEPS = 3
"""Consecutive steps with a non-finite loss or gradient after which the last good weights are restored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """See the settings of the same names."""

    learning_rate: float = 1e-3
    adaptation_rate: float = 3e-4
    warmup_steps: int = 20
    clip_norm: float = 1.0
    ttt_steps: int = 3
    step_decay: float = 0.8
    loss: str = "forward_kl"
    acceptance_weight: float = 0.0
    correction_weight: float = 1.0
    discard_weight: float = 0.0
    """Lambda in `losses`. Samples without counterfactuals are not affected."""
    trains_head: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The result of one optimizer step. `is_skipped`: loss or gradient was not finite, so nothing changed."""

    loss: float
    grad_norm: float
    num_rows: int
    is_skipped: bool = False


class Learner:
    """The draft in training. Not thread-safe."""

    def __init__(
        self, target: TargetHead, config: DraftConfig, token_ids: Tensor, hyper: Hyperparameters, *, seed: int = 0
    ) -> None:
        self.hyper = hyper
        self.step = 0
        self._target = target
        self._vocabulary = self._restricted_to(token_ids)
        self.network = self._initial(config, token_ids, seed)
        self.network.lm_head.requires_grad_(requires_grad=hyper.trains_head)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, lr=hyper.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._num_bad = 0
        self._start_step = 0
        self._is_adapting = False
        self.average = self.network.copy()
        self._good = self._averaged_weights()

    def start_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Start from weights that know something already, and change them gently."""
        self._start_step = self.step
        self._is_adapting = True
        self._optimizer.state.clear()
        self._optimizer.zero_grad(set_to_none=True)  # a copy of the network would copy its gradients
        self.network.load_state_dict(tensors)
        self._vocabulary = self._restricted_to(self.network.token_ids)
        self.average = self.network.copy()
        self._good = self._averaged_weights()

    def continuing(self, draft: DraftNetwork) -> "Learner":
        """A learner that goes on from another draft of the same target, of any shape, with the same settings and step count."""
        learner = Learner(self._target, draft.config, draft.token_ids, self.hyper)
        learner.count_from(self.step)
        learner.start_from(draft.state_dict())
        return learner

    def count_from(self, step: int) -> None:
        """Count on from the steps of another learner; they say nothing about these weights."""
        self.step = self._start_step = step

    @property
    def learning_rate(self) -> float:
        """After warmup."""
        return self.hyper.adaptation_rate if self._is_adapting else self.hyper.learning_rate

    def train(self, samples: list[Sample]) -> StepReport:
        """One optimizer step on these samples."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self._num_steps + 1) / max(1, self.hyper.warmup_steps))
        self._optimizer.zero_grad(set_to_none=True)
        loss, num_rows = self._accumulate(samples)
        if num_rows == 0:
            return StepReport(loss=0.0, grad_norm=0.0, num_rows=0)
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.hyper.clip_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._skip()
            return StepReport(loss=loss, grad_norm=norm, num_rows=num_rows, is_skipped=True)
        self._optimizer.step()
        self._update_average()
        self.step += 1
        self._num_bad = 0
        return StepReport(loss=loss, grad_norm=norm, num_rows=num_rows)

    def closed_form(
        self, samples: Sequence[Sample], *, check: Callable[[], None] = lambda: None
    ) -> DraftNetwork | None:
        """A draft of the same shape and vocabulary without a gradient step; None if no sample has hidden states to fit.

        `check` is called before each part of the work, and may end it by an exception.
        """
        draft = self._initial(self.network.config, self.network.token_ids, self.step)
        return draft if closed_form.fit(draft, samples, num_steps=self.hyper.ttt_steps, check=check) else None

    def update_vocabulary(self, samples: Sequence[Sample], *, check: Callable[[], None] = lambda: None) -> bool:
        """Choose another vocabulary if the draft can then propose more of the traffic of `samples`. Returns whether it did.

        `check` as for `closed_form`; nothing has changed then.
        """
        c = self.network.config
        if c.hidden_size != c.target_hidden_size:
            return False  # the target's head has no rows for this draft
        counts = token_counts(samples, self._target, check)
        token_ids = vocabulary.choose(counts, always=self._target.config.eos_token_ids, size=c.draft_vocab_size)
        before, after = (float(counts[ids].sum()) for ids in (self.network.token_ids, token_ids))
        if after - before < MIN_MORE_TOKENS * float(counts.sum()):
            return False
        self._change_vocabulary(token_ids)
        return True

    def mark_good(self) -> None:
        """Keep the averaged weights, to restore them if training diverges."""
        self._good = self._averaged_weights()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to continue training."""
        return {
            "network": self.network.state_dict(),
            "average": self._averaged_weights(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "start_step": self._start_step,
            "is_adapting": self._is_adapting,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a learner of the same shape. States of earlier versions have no average."""
        self.start_from(state["network"])
        self._start_step = int(state.get("start_step", 0))
        self._is_adapting = bool(state.get("is_adapting"))
        self.average.load_state_dict(state.get("average", {}), strict=False)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.mark_good()

    @property
    def _num_steps(self) -> int:
        """Steps since the start from random weights or from another draft."""
        return self.step - self._start_step

    def _change_vocabulary(self, token_ids: Tensor) -> None:
        """Keep all weights but the head's rows of tokens that leave."""
        averaged = {name: w for name, w in self._averaged_weights().items() if not name.startswith("lm_head.")}
        self._optimizer.zero_grad(set_to_none=True)  # a copy of the network would copy its gradients
        self._optimizer.state.pop(self.network.lm_head.weight, None)
        self.network.change_vocabulary(token_ids, self._target.rows(token_ids))
        self._vocabulary = self._restricted_to(token_ids)
        self.average = self.network.copy()
        self.average.load_state_dict(averaged, strict=False)
        self.mark_good()

    def _restricted_to(self, token_ids: Tensor) -> DraftVocabulary:
        c = self._target.config
        return DraftVocabulary.of(self._target.head, token_ids, logit_scale=c.logit_scale, logit_cap=c.logit_cap)

    def _initial(self, config: DraftConfig, token_ids: Tensor, seed: int) -> DraftNetwork:
        target = self._target
        return initial_network(
            config, target.embedding, target.rows(token_ids), target.final_norm, token_ids, seed=seed
        )

    def _averaged_weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.average.named_parameters() if p.requires_grad}

    def _update_average(self) -> None:
        """An exponential average. Its horizon is a tenth of the steps since the start, within bounds."""
        average, network = ([p for p in one.parameters() if p.requires_grad] for one in (self.average, self.network))
        least = MIN_DECAY if self._is_adapting else 0.0
        decay = min(MAX_DECAY, max(least, (1 + self._num_steps) / (10 + self._num_steps)))
        get_ema_multi_avg_fn(decay)(average, network, None)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _skip(self) -> None:
        """Count a skipped step. After several in a row, restore the last good weights and reset the optimizer."""
        self._num_bad += 1
        if self._num_bad >= MAX_BAD_STEPS:
            self.network.load_state_dict(self._good, strict=False)
            self.average.load_state_dict(self._good, strict=False)
            self._optimizer.state.clear()
            self._num_bad = 0

    def _accumulate(self, samples: list[Sample]) -> tuple[float, int]:
        """Add the gradients of the loss over all samples; return the loss and its number of rows.

        At most `FORWARD_ROWS` rows pass through the layer at once and `LOGIT_ROWS` through the head, each part with its own
        backward pass, because autograd keeps several copies of all intermediate values: gigabytes for long answers.
        """
        hyper = self.hyper
        weights = importance.weights([sample.probability for sample in samples])
        by_id = {sample.trace_id: weight for sample, weight in zip(samples, weights, strict=True)}
        batches = [self._batch(group, [by_id[sample.trace_id] for sample in group]) for group in _groups(samples)]
        texts = [(batch.text, batch.weights) for batch in batches]
        discards = [(batch.discarded, batch.weights) for batch in batches if batch.discarded is not None]
        num_rows = sum(len(rows) for rows, _ in [*texts, *discards])
        if not any(len(rows) for rows, _ in texts):
            return 0.0, 0
        text_scales, discard_scales = self._scales(texts, 1.0), self._scales(discards, hyper.discard_weight)
        loss = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                states = self.network.unroll_tree(batch.aux, batch.tree, first_row=batch.first_row)
            leaves = [state.detach().requires_grad_() for state in states]
            loss += self._backward(leaves, batch.text, batch.weights, self._text_loss, text_scales)
            if batch.discarded is not None:
                loss += self._backward(leaves, batch.discarded, batch.weights, forward_kl, discard_scales)
            trained = [j for j, leaf in enumerate(leaves) if leaf.grad is not None]
            if trained:
                torch.autograd.backward([states[j] for j in trained], [leaves[j].grad for j in trained])
        return loss, num_rows

    def _batch(self, samples: list[Sample], weights: Sequence[float]) -> Batch:
        batch = Batch.of(samples, num_steps=self.hyper.ttt_steps, known=self.network.t2d, weights=weights)
        if not self.hyper.discard_weight:
            return batch
        return batch.with_branches(samples, turn=self.step, known=self.network.t2d)

    def _scales(self, parts: list[tuple[TrainingRows, Tensor]], weight: float) -> list[float]:
        """The factor per step that turns the weighted sum of the losses of all rows into a weighted mean."""
        sums = [
            sum(float(self._weights_of(rows, weights, rows.of_step(j)[2]).sum()) for rows, weights in parts)
            for j in range(self.hyper.ttt_steps)
        ]
        return [weight * self.hyper.step_decay**j / total if total else 0.0 for j, total in enumerate(sums)]

    def _weights_of(self, rows: TrainingRows, weights: Tensor, indices: Tensor) -> Tensor:
        """The weight of each of these rows; `weights` are those of the samples."""
        corrections = rows.corrections[indices].float()
        return weights[rows.sample[indices]] * (1.0 + self.hyper.correction_weight * corrections)

    def _text_loss(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        hyper = self.hyper
        loss = LOSSES[hyper.loss](log_q, log_p)
        if hyper.acceptance_weight:
            loss = loss + hyper.acceptance_weight * LOSSES["acceptance"](log_q, log_p)
        return loss

    def _backward(
        self, states: list[Tensor], rows: TrainingRows, weights: Tensor, loss: Loss, scales: list[float]
    ) -> float:
        """Add the gradients of states [B, T, D] and of the head; return the loss."""
        total = 0.0
        for chunk in rows.split(LOGIT_ROWS):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                log_p = chunk.log_p(self._vocabulary)
            for j, (state, scale) in enumerate(zip(states, scales, strict=True)):
                sample, column, indices = chunk.of_step(j)
                if not len(indices):
                    continue
                with torch.autocast("cpu", torch.bfloat16):
                    log_q = self.network.logits(state[sample, column]).float().log_softmax(-1)
                    losses = loss(log_q, log_p if len(indices) == len(chunk) else log_p[indices])
                    part = scale * (losses * self._weights_of(chunk, weights, indices)).sum()
                part.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                total += part.item()
        return total


def _groups(samples: list[Sample]) -> list[list[Sample]]:
    """Groups of samples of similar length, each as large as `FORWARD_ROWS` allows."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda one: one.num_rows):
        if groups and (len(groups[-1]) + 1) * sample.num_rows <= FORWARD_ROWS:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups

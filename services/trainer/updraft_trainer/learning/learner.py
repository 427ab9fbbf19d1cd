"""One optimizer step of EAGLE-3 training-time test (arXiv 2503.01840, section 3.2) on a batch of samples.

Step j of the unrolled draft at row t predicts the token at t + 2 + j. Its teacher is the target's prediction at row t + 1 + j
(the last hidden state through the frozen head, or the most likely tokens), restricted to the draft vocabulary and
renormalised. Step j has the weight decay^j. Rows whose token replaced a rejected draft token have a higher weight, because the
draft was wrong there.

Weights and optimizer state are float32, and so is the divergence; forward and backward passes run in bfloat16 (see `Compute`).
A head that is not trained is stored in that dtype, once for draft and teacher.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from updraft_trainer.learning.batch import Batch, Packer, TrainingRows, grouped, packed_rows
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.flops import batch_flops
from updraft_trainer.learning.head_loss import Objective, head_loss
from updraft_trainer.learning.losses import LOSSES, Loss, combined, forward_kl
from updraft_trainer.learning.step_time import StepTimes

logger = logging.getLogger(__name__)

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
        self,
        target: TargetHead,
        config: DraftConfig,
        token_ids: Tensor,
        hyper: Hyperparameters,
        *,
        compute: Compute | None = None,
        seed: int = 0,
    ) -> None:
        self.hyper = hyper
        self.step = 0
        self._compute = compute or Compute()
        self.times = StepTimes(self._compute.device)
        self._pack_tokens = self._compute.pack_tokens
        self._text_loss = _text_loss(hyper)
        self._target = target
        self.network = self._on_device(self._initial(config, token_ids, seed))
        self._vocabulary = self._use_head()
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
        self._vocabulary = self._use_head()
        self.average = self.network.copy()
        self._good = self._averaged_weights()

    def continuing(self, draft: DraftNetwork) -> "Learner":
        """A learner that goes on from another draft of the same target, of any shape, with the same settings and step count."""
        learner = Learner(self._target, draft.config, draft.token_ids.cpu(), self.hyper, compute=self._compute)
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

    @property
    def step_rate(self) -> float:
        """The learning rate of the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def train(self, samples: list[Sample]) -> StepReport:
        """One optimizer step on these samples."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self._num_steps + 1) / max(1, self.hyper.warmup_steps))
        loss, num_rows = self._gradients(samples)
        if num_rows == 0:
            return StepReport(loss=0.0, grad_norm=0.0, num_rows=0)
        with self.times.phase("optimizer"):
            norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.hyper.clip_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._skip()
            return StepReport(loss=loss, grad_norm=norm, num_rows=num_rows, is_skipped=True)
        with self.times.phase("optimizer"):
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
        draft = self._initial(self.network.config, self.network.token_ids.cpu(), self.step)
        fitted = closed_form.fit(draft, samples, num_steps=self.hyper.ttt_steps, check=check)
        return self._on_device(draft) if fitted else None

    def update_vocabulary(self, samples: Sequence[Sample], *, check: Callable[[], None] = lambda: None) -> bool:
        """Choose another vocabulary if the draft can then propose more of the traffic of `samples`. Returns whether it did.

        `check` as for `closed_form`. If it raises, nothing has changed.
        """
        c, known = self.network.config, self.network.token_ids.cpu()
        if c.hidden_size != c.target_hidden_size:
            return False  # the target's head has no rows for this draft
        counts = token_counts(samples, self._target, check)
        token_ids = vocabulary.choose(counts, always=self._target.config.eos_token_ids, size=c.draft_vocab_size)
        before, after = (float(counts[ids].sum()) for ids in (known, token_ids))
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
        self._vocabulary = self._use_head()
        self.average = self.network.copy()
        self.average.load_state_dict(averaged, strict=False)
        self.mark_good()

    def _on_device(self, network: DraftNetwork) -> DraftNetwork:
        """The network to train. A frozen head has the dtype that it is computed in."""
        head, compute = network.lm_head, self._compute
        head.requires_grad_(requires_grad=self.hyper.trains_head)
        if not self.hyper.trains_head:
            head.weight.data = head.weight.data.to(compute.dtype)
        network.share(network.embedding.to(compute.device))
        return network.to(compute.device)

    def _use_head(self) -> DraftVocabulary:
        """The teacher's vocabulary. It has the draft's own head if that is the target's and is not trained."""
        c, compute = self._target.config, self._compute
        vocabulary = DraftVocabulary.of(
            self._target.head,
            self.network.token_ids.cpu(),
            logit_scale=c.logit_scale,
            logit_cap=c.logit_cap,
            dtype=compute.dtype,
        ).to(compute.device)
        head = self.network.lm_head.weight
        is_shared = not head.requires_grad and torch.equal(head, vocabulary.head)
        return replace(vocabulary, head=head.detach()) if is_shared else vocabulary

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

    def _gradients(self, samples: list[Sample]) -> tuple[float, int]:
        """Set the gradients of the loss; return it and its number of rows.

        The first time that the device's memory does not suffice, passes become half as large from then on. After that, a batch
        that does not fit is left out: one of its samples is too long.
        """
        self._optimizer.zero_grad(set_to_none=True)
        try:
            return self._accumulate(samples)
        except torch.OutOfMemoryError:
            is_first = self._pack_tokens == self._compute.pack_tokens
        self._optimizer.zero_grad(set_to_none=True)
        if self._compute.device.type == "cuda":
            torch.cuda.empty_cache()
        if not is_first:
            longest = max(sample.num_rows for sample in samples)
            logger.warning(
                "The device is out of memory; this batch, with a request of %s tokens, is not trained on."
                " UPDRAFT_TRAINER_RECOMPUTE needs less memory",
                f"{longest:,}",
            )
            return 0.0, 0
        self._pack_tokens //= 2
        logger.warning("The device is out of memory; passes have %s tokens from now on", f"{self._pack_tokens:,}")
        return self._gradients(samples)

    def _accumulate(self, samples: list[Sample]) -> tuple[float, int]:
        """Add the gradients of the loss over all samples; return the loss and its number of rows.

        At most `Compute.pack_tokens` rows are packed for one forward and backward pass; a longer sample has a pass of its own.
        """
        hyper, compute = self.hyper, self._compute
        with self.times.phase("data"):
            batches = self._batches(samples)
        num_rows = sum(len(batch.text) + len(batch.discarded) for batch in batches)
        if not any(len(batch.text) for batch in batches):
            return 0.0, 0
        text_scales = self._scales([batch.text for batch in batches], 1.0)
        discard_scales = self._scales([batch.discarded for batch in batches], hyper.discard_weight)
        loss = torch.zeros((), device=compute.device)
        for packed in batches:
            with self.times.phase("transfer"):
                batch = packed.to(compute.device)
            objectives = [
                Objective(rows=batch.text, loss=self._text_loss, scales=text_scales),
                Objective(rows=batch.discarded, loss=forward_kl, scales=discard_scales),
            ]
            loss += self._backward(batch, [one for one in objectives if len(one.rows)])
        return float(loss), num_rows

    def _batches(self, samples: list[Sample]) -> list[Batch]:
        """The samples, packed; those without a row to train on are left out."""
        hyper = self.hyper
        weights = importance.weights([sample.probability for sample in samples])
        turn = self.step if hyper.discard_weight else None
        sizes = [packed_rows(sample, hyper.ttt_steps, turn) for sample in samples]
        known, batches = self.network.t2d.cpu(), list[Batch | None]()
        for group in grouped(sizes, self._pack_tokens):
            packer = Packer(
                num_steps=hyper.ttt_steps, known=known, correction_weight=hyper.correction_weight, turn=turn
            )
            for index in group:
                packer.add(samples[index], weights[index])
            batches.append(packer.batch())
        return [batch for batch in batches if batch is not None]

    def _scales(self, parts: Sequence[TrainingRows], weight: float) -> list[float]:
        """The factor per step that turns the weighted sum of the losses of all rows into a weighted mean."""
        sums = [sum(rows.weight_of_step(j) for rows in parts) for j in range(self.hyper.ttt_steps)]
        return [weight * self.hyper.step_decay**j / total if total else 0.0 for j, total in enumerate(sums)]

    def _backward(self, batch: Batch, objectives: Sequence[Objective]) -> Tensor:
        """Add the gradients of one batch; return the loss, float32 []."""
        network, compute = self.network, self._compute
        with self.times.phase("forward"), compute.autocast():
            states = network.unroll_packed(batch.aux.to(compute.dtype), batch.layout, recompute=compute.recompute)
            normed = [network.norm(state) for state in states]
            losses = [head_loss(normed, network.lm_head.weight, one, self._vocabulary) for one in objectives]
        loss = torch.stack(losses).sum()
        with self.times.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.times.flops += batch_flops(network.config, batch, trains_head=self.hyper.trains_head)
        return loss.detach()


def _text_loss(hyper: Hyperparameters) -> Loss:
    loss = LOSSES[hyper.loss]
    return combined(loss, LOSSES["acceptance"], hyper.acceptance_weight) if hyper.acceptance_weight else loss

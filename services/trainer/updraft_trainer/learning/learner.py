"""One optimizer step of EAGLE-3 training-time test (arXiv 2503.01840, section 3.2) on a batch of samples.

Step j of the unrolled draft at row t predicts the token at t + 2 + j. Its teacher is the target's prediction at row t + 1 + j
(the last hidden state through the frozen head, or the most likely tokens), restricted to the draft vocabulary and
renormalised. Step j has the weight decay^j. Rows whose token replaced a rejected draft token have a higher weight, because the
draft was wrong there.

Weights and optimizer state are float32, and so is the divergence; forward and backward passes run in bfloat16 where the
device multiplies it fast (see `Compute`). A head that is not trained is stored in that dtype, once for draft and teacher.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from updraft_draft import vocabulary
from updraft_draft.config import DraftConfig
from updraft_draft.network import Compile, DraftNetwork, uncompiled
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data import importance
from updraft_trainer.data.frequency import token_counts
from updraft_trainer.data.sample import Sample
from updraft_trainer.learning import closed_form
from updraft_trainer.learning.average import FITTED_DECAY, TRAINED_DECAY, AveragedWeights
from updraft_trainer.learning.batch import Batch, Packer, grouped, packed_rows, step_weights
from updraft_trainer.learning.compiled import compiler_error, warm_up_sample
from updraft_trainer.learning.compute import Compute
from updraft_trainer.learning.draft_factory import DraftFactory
from updraft_trainer.learning.flops import batch_flops
from updraft_trainer.learning.gradients import Share, StepReport, Total, summed
from updraft_trainer.learning.head_loss import Objective, head_loss
from updraft_trainer.learning.losses import forward_kl, text_loss
from updraft_trainer.learning.optimizer import DraftOptimizer
from updraft_trainer.learning.step_time import StepTimes

logger = logging.getLogger(__name__)

Scales = tuple[Sequence[float], Sequence[float]]
"""Factors of the losses of each step, for texts and for branches."""

MIN_MORE_TOKENS = 0.01
"""Share of the traffic's tokens that another vocabulary must add. Each change makes the next version larger to download."""

_WARM_UP_ROWS = (40, 72)

MAX_BAD_STEPS = 3
"""Consecutive steps with a non-finite loss or gradient after which the last good weights are restored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """See the settings of the same names."""

    learning_rate: float = 1e-3
    adaptation_rate: float = 1.5e-4
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
        """Ranks (see `Compute`) that pass the same arguments have the same weights."""
        self.hyper = hyper
        self.step = 0
        self.step_rate = 0.0
        """The learning rate of the last step."""
        self._compute = compute or Compute()
        self._ranks = self._compute.ranks
        self.times = StepTimes(self._compute.device)
        self._pack_tokens = self._compute.pack_tokens
        self._compiled: Compile = uncompiled if self._compute.compiler is None else self._compute.compiler.compiled
        self._text_loss = text_loss(hyper.loss, hyper.acceptance_weight)
        self._target = target
        self._drafts = DraftFactory.of(target, self._compute, trains_head=hyper.trains_head)
        self.network = self._drafts.on_device(self._drafts.initial(config, token_ids, seed))
        self._use_vocabulary()
        self._trained = [p for p in self.network.parameters() if p.requires_grad]
        is_sharded = self._compute.is_sharded(sum(one.numel() for one in self._trained))
        self._optimizer = DraftOptimizer(self._trained, self._ranks, is_sharded=is_sharded)
        self._num_bad = 0
        self._start_step = 0
        self._is_adapting = False
        # If ranks divide the optimizer's state, only rank 0 keeps an average, which is what it judges and publishes.
        self._average = AveragedWeights(self.network, is_kept=self._ranks.leads or not is_sharded)

    def start_from(self, tensors: Mapping[str, Tensor], *, least_decay: float = TRAINED_DECAY) -> None:
        """Start from weights that know something already, and change them gently. `least_decay` is that of the average."""
        self._start_step = self.step
        self._is_adapting = True
        self._optimizer.reset()
        self._optimizer.zero_grad()  # a copy of the network would copy its gradients
        self.network.load_state_dict(tensors)
        self._use_vocabulary()
        self._average.start(least_decay)
        self._num_bad = 0

    def start_from_fit(self, draft: DraftNetwork) -> None:
        """Start from a draft in closed form."""
        self.start_from(draft.state_dict(), least_decay=FITTED_DECAY)

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

    def train(self, samples: list[Sample]) -> StepReport:
        """One optimizer step on these samples, and on those that the other ranks call this with at the same time.

        Its loss is that of one batch with the samples of all ranks. A rank without samples calls it too.
        """
        self.warm_up()
        total = self._gradients(samples)
        if total is None or total.is_empty:
            return StepReport(loss=0.0, grad_norm=0.0, num_rows=0, is_skipped=total is not None)
        with self.times.phase("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(self._trained, self.hyper.clip_norm)
        # A single rank waits for its GPU here, and nowhere else in a step.
        loss, grad_norm = torch.stack([total.loss.to(norm), norm]).tolist()
        report = StepReport(loss=loss, grad_norm=grad_norm, num_rows=total.num_rows, left_out=total.left_out)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            logger.warning("Skipped a step with a non-finite loss or gradient", extra={"step": self.step})
            self._skip()
            return replace(report, is_skipped=True)
        self._warn_of(report)
        self.step_rate = self.learning_rate * min(1.0, (self._num_steps + 1) / max(1, self.hyper.warmup_steps))
        with self.times.phase("optimizer"):
            self._optimizer.step(self.step_rate)
            self._average.update(self._num_steps)
        self.step += 1
        self._num_bad = 0
        return report

    @property
    def average(self) -> DraftNetwork:
        """The draft with averaged weights."""
        return self._average.network

    @property
    def is_cold(self) -> bool:
        """Whether the first step is still to be compiled, if it is."""
        return self._compute.compiler is not None and not self._compute.compiler.is_warm

    def warm_up(self) -> float:
        """Compile the step before the first one; return the seconds that it took, up to minutes."""
        return 0.0 if self._compute.compiler is None else self._compute.compiler.warm_up(self._warm_up)

    def closed_form(
        self, samples: Sequence[Sample], *, check: Callable[[], None] = lambda: None
    ) -> DraftNetwork | None:
        """A draft of the same shape and vocabulary without a gradient step; None if no sample tells the target's last states.

        `check` is called before each part of the work, and may end it by an exception.
        """
        draft = self._drafts.initial(self.network.config, self.network.token_ids.cpu(), self.step)
        fitted = closed_form.fit(draft, samples, self._vocabulary, num_steps=self.hyper.ttt_steps, check=check)
        return self._drafts.on_device(draft) if fitted else None

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
        if after - before <= MIN_MORE_TOKENS * float(counts.sum()):  # also if there is no token
            return False
        self._change_vocabulary(token_ids)
        return True

    def mark_good(self) -> None:
        """Keep the averaged weights, to restore them if training diverges."""
        self._average.mark_good()

    def collect(self) -> None:
        """Send what other ranks hold of the state to rank 0, for its `state_dict`. All ranks call it after the last step."""
        self._optimizer.collect()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to continue training. It shares the memory of the learner."""
        return {
            "network": self.network.state_dict(),
            "average": self._average.tensors(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "start_step": self._start_step,
            "is_adapting": self._is_adapting,
            "least_decay": self._average.least_decay,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a learner of the same shape."""
        self.start_from(state["network"], least_decay=float(state.get("least_decay", TRAINED_DECAY)))
        self._start_step = int(state["start_step"])
        self._is_adapting = bool(state["is_adapting"])
        self._average.load(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])

    @property
    def _num_steps(self) -> int:
        """Steps since the start from random weights or from another draft."""
        return self.step - self._start_step

    def _change_vocabulary(self, token_ids: Tensor) -> None:
        """Keep all weights but the head's rows of tokens that leave."""
        averaged = {name: w for name, w in self._average.copied().items() if not name.startswith("lm_head.")}
        self._optimizer.zero_grad()  # a copy of the network would copy its gradients
        self._optimizer.forget(self.network.lm_head.weight)
        self.network.change_vocabulary(token_ids, self._target.rows(token_ids))
        self._use_vocabulary()
        self._average.start(self._average.least_decay)
        self._average.load(averaged)
        self._num_bad = 0

    def _use_vocabulary(self) -> None:
        """Teach the network's vocabulary."""
        self._vocabulary = self._drafts.vocabulary(self.network)
        self._known = self.network.t2d.cpu()  # so that no step waits for it

    def _warn_of(self, report: StepReport) -> None:
        if report.left_out and self._ranks.leads:
            named = ", ".join(map(str, report.left_out))
            logger.warning("Loss or gradients are not finite on rank %s; step %s goes on without it", named, self.step)

    def _skip(self) -> None:
        """Count a skipped step. After several in a row, restore the last good weights and reset the optimizer."""
        self._num_bad += 1
        if self._num_bad >= MAX_BAD_STEPS:
            self._average.restore_good()
            if self._optimizer.is_sharded:
                self._ranks.broadcast([one.detach() for one in self._trained])
            self._optimizer.reset()
            self._num_bad = 0

    def _gradients(self, samples: list[Sample]) -> Total | None:
        """Set the gradients of the mean loss over the samples of all ranks; None if they have no row to train on."""
        self._optimizer.zero_grad()
        with self.times.phase("all_reduce"):
            counts = self._counts(samples)
        with self.times.phase("data"):
            batches = self._batches(samples, counts)
            own = step_weights(batches, self.hyper.ttt_steps)
        weights = own.clone()
        with self.times.phase("all_reduce"):
            self._ranks.sum([weights])
        text, discarded = weights.tolist()
        if not text[0]:
            return None
        scales = self._scales(text, 1.0), self._scales(discarded, self.hyper.discard_weight)
        loss = self._passes(batches, samples, counts, scales)
        num_rows = sum(len(batch.text) + len(batch.discarded) for batch in batches)
        nothing = torch.zeros((), device=self._compute.device)
        share = Share(loss=nothing) if loss is None else Share(loss=loss, num_rows=num_rows, weight=float(own[0, 0]))
        with self.times.phase("all_reduce"):
            return summed(self._ranks, self._trained, share, text[0])

    def _passes(
        self, batches: list[Batch], samples: list[Sample], counts: Sequence[float], scales: Scales
    ) -> Tensor | None:
        """Add the gradients of this rank's batches; return the loss, or None if they are left out.

        The first time that the device's memory does not suffice, passes become half as large from then on. After that, a batch
        that does not fit is left out: one of its samples is too long.
        """
        try:
            return self._accumulate(batches, scales)
        except torch.OutOfMemoryError:
            is_first = self._pack_tokens == self._compute.pack_tokens
        except compiler_error() as error:
            compiler = self._compute.compiler
            if compiler is None or compiler.has_failed:
                raise
            compiler.give_up(error)
            self._optimizer.zero_grad()
            return self._passes(batches, samples, counts, scales)
        self._optimizer.zero_grad()
        if self._compute.device.type == "cuda":
            torch.cuda.empty_cache()
        if not is_first:
            longest = max(sample.num_rows for sample in samples)
            logger.warning(
                "The device is out of memory; this batch, with a request of %s tokens, is not trained on."
                " UPDRAFT_TRAINER_RECOMPUTE needs less memory",
                f"{longest:,}",
            )
            return None
        self._pack_tokens //= 2
        logger.warning("The device is out of memory; passes have %s tokens from now on", f"{self._pack_tokens:,}")
        return self._passes(self._batches(samples, counts), samples, counts, scales)

    def _accumulate(self, batches: Sequence[Batch], scales: Scales) -> Tensor:
        """Add the gradients of the loss over all batches, of one forward and backward pass each; return the loss."""
        compute = self._compute
        loss = torch.zeros((), device=compute.device)
        for packed in batches:
            with self.times.phase("transfer"):
                batch = packed.to(compute.device)
            loss += self._backward(batch, scales)
        return loss

    def _counts(self, samples: Sequence[Sample]) -> list[float]:
        """How much each of this rank's samples counts among those of all ranks."""
        of_ranks = self._ranks.broadcast_object(self._ranks.gather([sample.probability for sample in samples]))
        start = sum(map(len, of_ranks[: self._ranks.rank]))
        return importance.weights([one for of_rank in of_ranks for one in of_rank])[start : start + len(samples)]

    def _batches(self, samples: Sequence[Sample], counts: Sequence[float]) -> list[Batch]:
        """The samples, packed, at most `Compute.pack_tokens` rows in a batch; a longer sample has one of its own. Samples
        without a row to train on are left out."""
        hyper = self.hyper
        turn = self.step if hyper.discard_weight else None
        sizes = [packed_rows(sample, hyper.ttt_steps, turn) for sample in samples]
        batches = list[Batch | None]()
        for group in grouped(sizes, self._pack_tokens):
            packer = Packer(
                num_steps=hyper.ttt_steps, known=self._known, correction_weight=hyper.correction_weight, turn=turn
            )
            for index in group:
                packer.add(samples[index], counts[index])
            batches.append(packer.batch())
        return [batch for batch in batches if batch is not None]

    def _scales(self, totals: Sequence[float], weight: float) -> list[float]:
        """The factor per step that turns the weighted sum of the losses of all rows into a weighted mean."""
        return [weight * self.hyper.step_decay**j / total if total else 0.0 for j, total in enumerate(totals)]

    def _warm_up(self) -> None:
        """Passes over texts of two lengths, and over a branch if any will be; nothing is learnt of them."""
        ones = [1.0] * self.hyper.ttt_steps
        with self.times.whole("compile"):
            for num_rows in _WARM_UP_ROWS:
                sample = warm_up_sample(
                    self._target, self.network.token_ids[:1].cpu(), num_rows, has_branch=self.hyper.discard_weight > 0
                )
                for batch in self._batches([sample], [1.0]):
                    self._backward(batch.to(self._compute.device), (ones, ones))
        self._optimizer.zero_grad()

    def _backward(self, batch: Batch, scales: Scales) -> Tensor:
        """Add the gradients of one batch; return the loss, float32 []."""
        network, compute, compiled = self.network, self._compute, self._compiled
        objectives = [
            Objective(rows=batch.text, loss=self._text_loss, scales=scales[0]),
            Objective(rows=batch.discarded, loss=forward_kl, scales=scales[1]),
        ]
        with self.times.phase("forward"), compute.autocast():
            aux = batch.aux.to(compute.dtype)
            states = network.unroll_packed(aux, batch.layout, recompute=compute.recompute, compiled=compiled)
            states, head = [network.norm(state) for state in states], network.lm_head.weight
            losses = [head_loss(states, head, one, self._vocabulary, compiled) for one in objectives if len(one.rows)]
        loss = torch.stack(losses).sum()
        del states  # the backward pass needs none of them
        with self.times.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.times.flops += batch_flops(network.config, batch, trains_head=self.hyper.trains_head)
        return loss.detach()

"""Trains a first draft on a dataset: in closed form, and with gradient steps if the requests suffice for `MIN_STEPS`, because
fewer make the draft worse. Held-out requests choose between both.

A run may be killed at any time. The draft in closed form and the last saved state lie in a folder that is named by everything
the run depends on, so another run never goes on from them.
"""

import hashlib
import random
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path
from shutil import rmtree

from torch import Tensor

from updraft_chassis.errors import Conflict, Corrupt, InvalidInput, NotFound
from updraft_chassis.progress import Progress, Report
from updraft_draft import checkpoint, memory
from updraft_draft.config import DraftConfig
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.selection import TrafficMix
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.offline.dataset import Dataset, Item
from updraft_trainer.publishing.estimate import GainEstimate, compare, num_tokens, verify_steps
from updraft_trainer.publishing.publish import Candidate, snapshot
from updraft_trainer.states.state import Identity, State, States, TrainingHistory

LOOKAHEAD = 3
BATCH = 4
MIN_STEPS = 200
SAVE_S = 1.0
"""Training time between two saved states, at least."""
SAVE_SHARE = 0.05
"""Maximum share of the time that saving takes."""
MAX_FIT_BYTES = 1024**3
"""Memory for the samples that the closed form and the vocabulary come from."""

_HYPER = Hyperparameters(adaptation_rate=3e-4)
"""Twice the rate of online training: nothing is forgotten here that comes again in each epoch."""
_SEED = 0
_NAME_CHARS = 16

_ALL_ALIKE = TrafficMix(shares={"": 1.0})
"""Each held-out request counts as much as any other."""


class OfflineTraining:
    """One draft from one dataset. `folder` is for what a killed run leaves to the next one."""

    def __init__(self, target: TargetHead, dataset: Dataset, folder: Path, *, epochs: int, report: Report) -> None:
        """`epochs`: how often each sample is trained on."""
        self.identity = Identity(
            speculator="",
            target_fingerprint=dataset.expected.target_fingerprint,
            tokenizer_fingerprint=dataset.expected.tokenizer_fingerprint,
        )
        self._target = target
        self._dataset = dataset
        self._epochs = epochs
        self._report = report
        content = f"{self.identity} {dataset.digest} {epochs} {_HYPER}"
        self._digest = hashlib.sha256(content.encode()).hexdigest()
        self._folder = folder / self._digest[:_NAME_CHARS]

    def clean(self) -> None:
        """Forget this run, once its draft is where it should be."""
        rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):  # somebody else's files are in it
            self._folder.parent.rmdir()

    def run(self) -> Candidate:
        """The draft that needs the fewest verify steps for the held-out requests that judged all drafts.

        Conflict if none did, because a trainer removes what it no longer needs from its folder.
        """
        judged = [(step, draft, self._judged(draft)) for step, draft in self._drafts()]
        common = set.intersection(*(set(estimate.trace_ids) for _, _, estimate in judged))
        if not common:
            raise Conflict("no held-out trace can be read any more: train from a copy of the folder")
        step, draft, estimate = min(judged, key=lambda one: _num_steps(one[2], common))
        return Candidate(network=draft, step=step, estimate=estimate, baseline_version=0, lookahead=LOOKAHEAD)

    def _drafts(self) -> Iterator[tuple[int, DraftNetwork]]:
        """As they would be published, with their optimizer steps: in closed form, and what training makes of it."""
        learner, first = self._started()
        if first is not None:
            yield 0, first
        order = self._order()
        if first is None or len(order) >= MIN_STEPS * BATCH:
            self._train(learner, order)
            yield learner.step, snapshot(learner.average)
        else:
            few = f"{len(order) // BATCH} optimizer steps are fewer than the {MIN_STEPS:,} that make it better"
            self._report(Progress(activity="judging", done=0, total=1, note=f"The draft stays in closed form: {few}."))

    def _started(self) -> tuple[Learner, DraftNetwork | None]:
        """A learner and the draft in closed form that it starts from; it starts from random weights where there is none."""
        place = self._folder / "closed-form"
        self._report(Progress(activity="solving for first weights", done=0, total=1))
        if (saved := _saved(place)) is None:
            learner, fitted = self._fitted()
            if fitted is None:
                return learner, None
            part = self._folder / "closed-form.part"
            checkpoint.save(snapshot(fitted), part)
            rmtree(place, ignore_errors=True)
            part.replace(place)
            self._remove_others()
            saved = checkpoint.load(place)
        config, tensors = saved
        draft = checkpoint.build(config, tensors, self._target.embedding)
        learner = self._learner(config, draft.token_ids)
        learner.start_from_fit(draft)
        return learner, draft

    def _fitted(self) -> tuple[Learner, DraftNetwork | None]:
        items = random.Random(_SEED).sample(self._dataset.training, len(self._dataset.training))
        num_affordable = sum(size <= MAX_FIT_BYTES for size in accumulate(item.num_bytes for item in items))
        samples = self._dataset.read(items[: max(1, num_affordable)])
        config = self._target.draft()
        token_ids = choose_vocabulary(samples, self._target, size=config.draft_vocab_size)
        learner = self._learner(config, token_ids)
        return learner, learner.closed_form(samples)

    def _learner(self, config: DraftConfig, token_ids: Tensor) -> Learner:
        return Learner(self._target, config, token_ids, _HYPER, seed=_SEED)

    def _order(self) -> list[Item]:
        """All samples once an epoch, in random order; the same each time, so that a run can go on in the middle."""
        rng, training = random.Random(_SEED), self._dataset.training
        return [item for _ in range(self._epochs) for item in rng.sample(training, len(training))]

    def _train(self, learner: Learner, order: Sequence[Item]) -> None:
        """Train in this order, from where the last saved state ends."""
        states, history = States(self._folder / "states"), TrainingHistory()
        if (state := states.load(self.identity)) is not None:
            learner.load_state_dict(state.learner)
            history = state.history
        first, total, tokens = sum(history.uses.values()), -(-len(order) // BATCH), 0
        note = f"Going on from step {first // BATCH:,} of {total:,}." if first else ""
        self._report(Progress(activity="training", done=first // BATCH, total=total, note=note))
        pace = _SavePace()
        for start in range(first, len(order), BATCH):
            batch = order[start : start + BATCH]
            if samples := self._dataset.read(batch):
                tokens += learner.train(samples).num_rows
                memory.release()
            history.count_uses(item.trace_id for item in batch)
            self._report(Progress(activity="training", done=start // BATCH + 1, total=total, tokens=tokens))
            if start + BATCH >= len(order) or pace.is_due():
                with pace:
                    states.save(self._state(learner, history))
                    self._remove_others()

    def _remove_others(self) -> None:
        """Remove what runs with other requests or options have left, once this one has something to go on from."""
        for other in self._folder.parent.glob(_NAME_CHARS * "[0-9a-f]"):
            if other != self._folder:
                rmtree(other, ignore_errors=True)

    def _state(self, learner: Learner, history: TrainingHistory) -> State:
        return State(
            identity=self.identity,
            token_ids=learner.network.token_ids,
            learner=learner.state_dict(),
            history=history,
            rng=(),
            config_digest=self._digest,
            draft_config=learner.network.config,
            taken_s=time.time(),
        )

    def _judged(self, draft: DraftNetwork) -> GainEstimate:
        estimates = []
        for n, item in enumerate(self._dataset.held_out):
            self._report(Progress(activity="judging", done=n, total=len(self._dataset.held_out)))
            samples = [sample for sample in self._dataset.read([item]) if num_tokens(sample)]
            estimates.append(compare(samples, verify_steps(draft, samples, lookahead=LOOKAHEAD), None, _ALL_ALIKE))
        return GainEstimate(
            trace_ids=tuple(chain.from_iterable(one.trace_ids for one in estimates)),
            domains=tuple(chain.from_iterable(one.domains for one in estimates)),
            pairs=tuple(chain.from_iterable(one.pairs for one in estimates)),
        )


def _num_steps(estimate: GainEstimate, trace_ids: Set[str]) -> int:
    pairs = zip(estimate.trace_ids, estimate.pairs, strict=True)
    return sum(pair.candidate_steps for trace_id, pair in pairs if trace_id in trace_ids)


def _saved(place: Path) -> tuple[DraftConfig, dict[str, Tensor]] | None:
    """A whole draft; None if there is none, or one that a power failure cut off."""
    try:
        return checkpoint.load(place)
    except (Corrupt, InvalidInput, NotFound):
        return None


class _SavePace:
    """When to save next: rarely enough that it takes a small share of the time."""

    def __init__(self) -> None:
        self._due_s = time.monotonic() + SAVE_S
        self._start_s = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self._due_s

    def __enter__(self) -> None:
        self._start_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now_s = time.monotonic()
        self._due_s = now_s + max(SAVE_S, (now_s - self._start_s) / SAVE_SHARE)

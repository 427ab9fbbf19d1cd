"""Feeds one arm with one stream, as serving and training would meet, without a clock: training keeps a set ratio to traffic.

Each request is decoded by the draft that serves when it comes: the exact walk over the recorded answer gives its verify steps,
and the tokens that replaced rejected drafts. Then the arm learns from it, or holds it out, and may publish.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from bench.learning.arms import Arm
from bench.learning.streams import Stream

from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead
from updraft_trainer.data import selection
from updraft_trainer.data.clusters import Clusters
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.retention import Pool, SampleEntry
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import DraftVocabulary
from updraft_trainer.learning.learner import Learner
from updraft_trainer.publishing.decision import NO_DRAFT, decide
from updraft_trainer.publishing.estimate import (
    BestDrafts,
    GainEstimate,
    against,
    compare,
    looks_better,
    num_tokens,
    verify_steps,
    walk,
)
from updraft_trainer.publishing.publish import snapshot
from updraft_trainer.publishing.schedule import is_fit_due, num_newest_judges

LOOKAHEAD = 3
DRAFT_VOCAB = 8192
FIRST_SAMPLES = 8
EVALUATION_SAMPLES = 32
FITTED_SAMPLES = 128
SAMPLED_ROWS = 128
"""Rows of the target's logits in memory at a time."""
CHECKPOINTS = (8, 16, 25, 50, 100, 200, 400, 600, 800, 1200, 1600)

HeldOut = Mapping[str, Sequence[Sample]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """After `requests` of the stream: verify steps of the served draft for each held-out request, by kind; none without a
    draft. `seconds` of one core went to the arm so far; `unknown` is the share of the kind's tokens that the draft cannot
    propose."""

    requests: int
    seconds: float
    version: int
    steps: dict[str, list[int]]
    unknown: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One arm on one stream with one seed. `published` are the requests after which a new version served."""

    checkpoints: tuple[Checkpoint, ...]
    published: tuple[int, ...]
    online: tuple[int, ...]
    """Verify steps of each request of the stream as it came."""
    sampled: dict[str, list[float]] = field(default_factory=dict)
    """By kind, for each held-out request: the mean probability, at temperature 1, that the target accepts the first token
    that the last served draft draws. Empty without a draft."""
    looks: tuple[tuple[int, str], ...] = ()
    """After how many requests a candidate was judged, and the decision as a sentence."""


@dataclass(slots=True)
class Memory:
    """The samples that an arm keeps, and how often each was used."""

    samples: dict[str, Sample] = field(default_factory=dict)
    entries: list[SampleEntry] = field(default_factory=list)
    uses: dict[str, int] = field(default_factory=dict)
    clusters: Clusters = field(default_factory=Clusters)

    def add(self, sample: Sample, *, is_evaluation: bool) -> None:
        self.samples[sample.trace_id] = sample
        entry = SampleEntry(
            trace_id=sample.trace_id,
            order=len(self.entries),
            cluster=self.clusters.assign("", sample.ids.tolist(), order=len(self.entries)),
            pool=Pool.EVALUATION if is_evaluation else Pool.WINDOW,
            num_bytes=0,
            num_tokens=sample.num_rows,
        )
        self.entries.append(entry)

    def batch(self, arm: Arm, rng: random.Random) -> list[Sample]:
        training = self._training()
        if arm.fifo_samples:
            unused = [entry for entry in training if entry.trace_id not in self.uses]
            chosen = unused[: arm.fifo_samples] if len(unused) >= arm.fifo_samples else []
        else:
            chosen = selection.training_batch(
                training,
                self.uses,
                num_tokens=arm.batch_tokens,
                max_uses=arm.max_uses,
                rng=rng,
                num_waiting=arm.num_waiting,
            )
        batch = [self.samples[entry.trace_id] for entry in chosen]
        self.count_use(batch)
        return batch

    def count_use(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self.uses[sample.trace_id] = self.uses.get(sample.trace_id, 0) + 1

    def sizes(self) -> Counter[str]:
        """Samples in each cluster, with held-out ones."""
        return Counter(entry.cluster for entry in self.entries)

    @property
    def num_training(self) -> int:
        """Samples that may be trained on."""
        return len(self._training())

    def closed_form(self, num_held_out: int) -> tuple[list[Sample], list[Sample]]:
        """Samples to fit, and newer ones to judge by."""
        training = self._training()
        fitted, held_out = selection.closed_form_batch(
            training, count=FITTED_SAMPLES, num_held_out=num_newest_judges(len(training), num_held_out)
        )
        return [self.samples[entry.trace_id] for entry in fitted], self._with_tokens(held_out)

    def untrained(self, count: int) -> list[Sample]:
        return self._with_tokens(selection.untrained_batch(self._training(), self.uses, count=count))

    def evaluation(self) -> list[Sample]:
        held_out = [entry for entry in selection.outliers_together(self.entries) if entry.pool is Pool.EVALUATION]
        return self._with_tokens(selection.evaluation_batch(held_out, count=EVALUATION_SAMPLES))

    def mix(self) -> selection.TrafficMix:
        return selection.traffic_mix(selection.outliers_together(self.entries))

    def _training(self) -> list[SampleEntry]:
        return [entry for entry in self.entries if entry.pool is not Pool.EVALUATION]

    def _with_tokens(self, entries: Sequence[SampleEntry]) -> list[Sample]:
        return [sample for sample in (self.samples[entry.trace_id] for entry in entries) if num_tokens(sample) > 0]


CLOSED_FORM, TRAINED = "a draft in closed form", "the draft in training"


class Judged(NamedTuple):
    """A draft, and how it compares with the one that serves. `name` is its subject in the sentence of a decision."""

    name: str
    draft: DraftNetwork
    estimate: GainEstimate


class Replay:
    """An arm at work on a stream."""

    def __init__(self, arm: Arm, target: TargetHead, held_out: HeldOut, *, seed: int) -> None:
        self._arm = arm
        self._target = target
        self._held_out = held_out
        self._seed = seed
        self._rng = random.Random(seed)
        self._memory = Memory()
        self._best = BestDrafts()
        self._learner: Learner | None = None
        self._served: DraftNetwork | None = None
        self._version = NO_DRAFT
        self._due = 0.0
        self._estimated = 0
        self._fitted = Counter[str]()
        self._restarted_from = NO_DRAFT
        self._seconds = 0.0
        self._online: list[int] = []
        self._looks: list[tuple[int, str]] = []

    @property
    def served(self) -> DraftNetwork | None:
        """The draft that serves now."""
        return self._served

    def start_from(self, draft: DraftNetwork, learned: Sequence[Sample] = (), held_out: Sequence[Sample] = ()) -> None:
        """Serve and go on learning from this draft. The arm remembers, in random order, requests that made it and requests
        that were held out meanwhile."""
        self._learner = Learner(self._target, draft.config, draft.token_ids, self._arm.hyper, seed=self._seed)
        self._learner.start_from(draft.state_dict())
        self._served, self._version = draft, 1
        for sample in self._rng.sample(learned, len(learned)):
            self._memory.add(sample, is_evaluation=False)
            self._memory.uses[sample.trace_id] = self._arm.max_uses
        for sample in self._rng.sample(held_out, len(held_out)):
            self._memory.add(sample, is_evaluation=True)
        self._fitted = self._memory.sizes()

    def run(self, traffic: Sequence[Sample], report: Callable[[int], None]) -> Run:
        """All requests in order; `report` hears how many are done."""
        checkpoints, published = [self._checkpoint(0)], []
        for n, sample in enumerate(traffic, 1):
            self._online.append(self._serve(sample, n))
            started, version = time.thread_time(), self._version
            self._learn(n)
            self._seconds += time.thread_time() - started
            if self._version != version:
                published.append(n)
            if n in CHECKPOINTS or n == len(traffic):
                checkpoints.append(self._checkpoint(n))
            report(n)
        return Run(
            checkpoints=tuple(checkpoints),
            published=tuple(published),
            online=tuple(self._online),
            sampled=self._sampled(),
            looks=tuple(self._looks),
        )

    def _sampled(self) -> dict[str, list[float]]:
        draft = self._served
        if draft is None:
            return {}
        return {
            kind: [accepted_when_sampled(draft, self._target, one) for one in samples]
            for kind, samples in self._held_out.items()
        }

    def _serve(self, sample: Sample, n: int) -> int:
        """Decode it with the served draft; keep it with the corrections of this decoding."""
        corrections = torch.zeros_like(sample.corrections)
        num_steps = num_tokens(sample)
        if self._served is not None and num_steps:
            (accepted,) = walk(self._served, [sample], lookahead=LOOKAHEAD)
            token = sample.first_output
            for count in accepted:
                num_drafted = min(LOOKAHEAD, sample.num_rows - token - 1)
                token += count + 1
                corrections[token] = count < num_drafted
            num_steps = len(accepted)
        every = self._arm.evaluation_every
        self._memory.add(replace(sample, corrections=corrections), is_evaluation=bool(every) and n % every == every - 1)
        return num_steps

    def _learn(self, n: int) -> None:
        arm = self._arm
        if self._learner is None:
            if n < FIRST_SAMPLES:
                return
            self._learner = self._new_learner()
        self._due += arm.steps_per_request
        while self._due >= 1.0:
            batch = self._memory.batch(arm, self._rng)
            if not batch:
                break
            self._due -= 1.0
            self._learner.train(batch)
            if not arm.publish_every and self._learner.step - self._estimated >= arm.evaluate_steps:
                self._estimate(self._learner)
        if arm.publish_every and n % arm.publish_every == 0:
            self._publish(snapshot(self._weights(self._learner)))
        if arm.has_closed_form:
            self._fit(self._learner)

    def _weights(self, learner: Learner) -> DraftNetwork:
        return learner.average if self._arm.is_averaged else learner.network

    def _new_learner(self) -> Learner:
        token_ids = choose_vocabulary(list(self._memory.samples.values()), self._target, size=DRAFT_VOCAB)
        draft = self._target.draft(draft_vocab_size=len(token_ids))
        learner = Learner(self._target, draft, token_ids, self._arm.hyper, seed=self._seed)
        first = learner.closed_form(list(self._memory.samples.values())) if self._arm.has_closed_form else None
        if first is not None:
            learner.start_from_fit(first)
            self._memory.count_use(list(self._memory.samples.values()))
        return learner

    def _estimate(self, learner: Learner) -> None:
        """Judge the draft in training. If it is surely worse than what serves, training goes on from that."""
        self._estimated = learner.step
        unseen = self._memory.untrained(self._arm.num_waiting)
        judged = self._judged(TRAINED, self._weights(learner), [*self._memory.evaluation(), *unseen])
        self._publish_if_better(judged)
        gain = judged.estimate.gain(self._arm.thresholds.confidence)
        is_worse = gain is not None and gain.high_percent < 0 and self._version != self._restarted_from
        if self._arm.has_closed_form and is_worse and self._served is not None:
            self._restarted_from = self._version
            learner.start_from(self._served.state_dict())

    def _fit(self, learner: Learner) -> None:
        num_judges, sizes = self._arm.thresholds.min_samples, self._memory.sizes()
        if self._memory.num_training < num_judges or not is_fit_due(sizes, self._fitted, first=2 * num_judges):
            return
        self._fitted = sizes
        samples, unseen = self._memory.closed_form(num_judges)
        if self._arm.follows_vocabulary:
            learner.update_vocabulary(samples)
        draft = learner.closed_form(samples)
        if draft is None:
            return
        judges = [*self._memory.evaluation(), *unseen]
        closed, trained = (
            self._judged(CLOSED_FORM, draft, judges),
            self._judged(TRAINED, self._weights(learner), judges),
        )
        estimate = against(closed.estimate, trained.estimate)
        gain = estimate.gain(self._arm.thresholds.confidence)
        least = -1.0 if gain is None else gain.low_percent if self._arm.starts_surely else gain.percent
        goes_on = least > 0.0 and not estimate.losses()
        candidates = [closed]
        if goes_on:
            learner.start_from_fit(draft)
        else:
            place = len(candidates) if looks_better(closed.estimate, trained.estimate) else 0
            candidates.insert(place, trained._replace(estimate=trained.estimate.without_learned(self._memory.uses)))
        published = next((one for one in candidates if self._publish_if_better(one)), None)
        if goes_on or published is closed:
            self._memory.count_use(samples)

    def _judged(self, name: str, network: DraftNetwork, samples: Sequence[Sample]) -> Judged:
        """Compare the draft of now with what serves."""
        draft = snapshot(network)
        baseline = None if self._served is None else verify_steps(self._served, samples, lookahead=LOOKAHEAD)
        estimate = compare(samples, verify_steps(draft, samples, lookahead=LOOKAHEAD), baseline, self._memory.mix())
        return Judged(name, draft, replace(estimate, best_steps=self._best.update(estimate)))

    def _publish_if_better(self, candidate: Judged) -> bool:
        """Publish what the trainer would: a candidate that is surely better than what serves."""
        decision = decide(
            candidate.estimate,
            subject=candidate.name,
            baseline_version=self._version,
            thresholds=self._arm.thresholds,
        )
        self._looks.append((len(self._online), decision.sentence))
        if decision.should_publish:
            self._publish(candidate.draft)
        return decision.should_publish

    def _publish(self, draft: DraftNetwork) -> None:
        self._served, self._version = draft, self._version + 1

    def _checkpoint(self, n: int) -> Checkpoint:
        draft = self._served
        return Checkpoint(
            requests=n,
            seconds=self._seconds,
            version=self._version,
            steps={
                kind: [num_tokens(one) for one in samples]
                if draft is None
                else verify_steps(draft, samples, lookahead=LOOKAHEAD)
                for kind, samples in self._held_out.items()
            },
            unknown={
                kind: 1.0 if draft is None else _unknown(draft, samples) for kind, samples in self._held_out.items()
            },
        )


def traffic(stream: Stream, training: Mapping[str, Sequence[Sample]], seed: int) -> list[Sample]:
    """The stream's requests: of each kind a different order for each seed."""
    shuffled = {
        kind: random.Random(f"{kind}/{seed}").sample(samples, len(samples)) for kind, samples in training.items()
    }
    turns = {kind: iter(samples) for kind, samples in shuffled.items()}
    return [next(turns[kind]) for kind in stream.order]


@torch.no_grad()
def accepted_when_sampled(draft: DraftNetwork, target: TargetHead, sample: Sample) -> float:
    """Mean over the output of sum of min(p, q): the probability that a token drawn from the draft's q is accepted (Leviathan
    et al. 2023, theorem 3.5). Tokens that the draft cannot propose have q = 0."""
    first = max(sample.first_output - 1, sample.first_teacher_row - 1, 0)
    ids = sample.ids[1 : sample.num_rows + 1]
    with torch.autocast("cpu", torch.bfloat16):
        (state,) = draft.unroll(sample.aux.decoded()[None], ids[None], num_steps=1, first_row=first)
    whole = DraftVocabulary.whole(target.head, logit_scale=target.config.logit_scale, logit_cap=target.config.logit_cap)
    total, count = 0.0, sample.num_rows - first - 1
    for start in range(0, count, SAMPLED_ROWS):
        end = min(start + SAMPLED_ROWS, count)
        teacher_row = first + 1 + start - sample.first_teacher_row
        with torch.autocast("cpu", torch.bfloat16):
            q = draft.logits(state[0, start:end]).float().softmax(-1)
            log_p = sample.teacher.at(slice(teacher_row, teacher_row + end - start)).log_p(whole)
        p = log_p.exp()[:, draft.token_ids]
        total += float(p.minimum(q).sum())
    return total / max(1, count)


def _unknown(draft: DraftNetwork, samples: Sequence[Sample]) -> float:
    tokens = torch.cat([sample.ids[sample.first_output :] for sample in samples])
    return 1.0 - float(draft.t2d[tokens].float().mean())

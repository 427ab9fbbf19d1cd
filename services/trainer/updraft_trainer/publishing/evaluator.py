"""Compares the draft in training with the serving draft, on held-out requests that neither was trained on.

The candidate is a snapshot with the values of a checkpoint, so the published draft is the measured one. The baseline's steps
are cached per request, so only new requests cost a forward pass of it. Of several ranks each walks its own requests, and rank 0
takes them together.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from updraft_chassis.tenants import hashes
from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork
from updraft_draft.vocabulary import unknown_share
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.sample import Sample
from updraft_trainer.publishing.decision import NO_DRAFT
from updraft_trainer.publishing.estimate import BestDrafts, Evidence, compare, merged, num_tokens, verify_steps
from updraft_trainer.publishing.publish import Candidate, snapshot
from updraft_trainer.publishing.registry_view import RegistryView, provenance_of

NUM_TRAINED = 8
"""Requests that were trained on, to see how much of them was learned by heart: a quarter of an estimate's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The serving draft; `network` is None if there is none. `steps` caches verify steps by trace id."""

    version: int = NO_DRAFT
    network: DraftNetwork | None = None
    steps: dict[str, int] = field(default_factory=dict)
    tenants: tuple[str, ...] = ()
    """Hashes of the tenants that it may have learned from, in hexadecimal. `has_more_tenants`: and from others."""
    has_more_tenants: bool = False


class Judge:
    """Compares drafts on about `num_samples` held-out requests of this rank, with `lookahead` drafts per verify step."""

    def __init__(
        self, replay: Replay, *, num_samples: int, lookahead: int, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` is called before each request, and may end an estimate by an exception."""
        self._replay = replay
        self._num_samples = num_samples
        self.lookahead = lookahead
        self._check = check
        self.baseline = Baseline()

    def evidence(self, candidate: DraftNetwork, unseen: Sequence[Sample] = ()) -> Evidence:
        """`unseen` are requests that may be trained on, and that this candidate was not trained on."""
        held_out = self._replay.evaluation_batch(count=self._num_samples)
        samples = [sample for sample in (*held_out, *unseen) if num_tokens(sample) > 0]
        steps, mix = self.verify_steps(candidate, samples), self._replay.traffic_mix()
        estimate = compare(samples, steps, self._baseline_steps(samples), mix)
        used = set(mix.shares) | {pair.kind for pair in estimate.pairs}
        return Evidence(
            estimate=estimate,
            outputs=tuple(_output(sample, candidate.token_ids.cpu()) for sample in samples),
            mix=replace(mix, kinds={id_: mix.kinds.get(id_, "") for id_ in estimate.trace_ids}),
            means={kind: mean for kind, mean in self._replay.cluster_means().items() if kind in used},
        )

    def verify_steps(self, network: DraftNetwork, samples: Sequence[Sample]) -> list[int]:
        return verify_steps(network, samples, lookahead=self.lookahead, check=self._check)

    def _baseline_steps(self, samples: list[Sample]) -> list[int] | None:
        """In the samples' order; None without a draft. Drops cached steps of other samples."""
        network, cache = self.baseline.network, self.baseline.steps
        if network is None:
            return None
        new = [sample for sample in samples if sample.trace_id not in cache]
        new_steps = self.verify_steps(network, new)
        steps = cache | {sample.trace_id: n for sample, n in zip(new, new_steps, strict=True)}
        cache.clear()
        cache.update({sample.trace_id: steps[sample.trace_id] for sample in samples})
        return [cache[sample.trace_id] for sample in samples]


def alone(candidate: DraftNetwork, own: Callable[[], Evidence]) -> list[Evidence]:
    """The evidence of this rank only."""
    return [own()]


class Evaluator:
    """Compares drafts on about `num_samples` held-out requests, with `lookahead` drafts per verify step."""

    def __init__(
        self,
        replay: Replay,
        registry: RegistryView,
        *,
        num_samples: int,
        lookahead: int,
        check: Callable[[], None] = lambda: None,
        gather: Callable[[DraftNetwork, Callable[[], Evidence]], list[Evidence]] = alone,
    ) -> None:
        """`check` as for `Judge`. `gather` returns the evidence of all ranks on a candidate; its second argument computes that
        of this one meanwhile."""
        self._judge = Judge(replay, num_samples=num_samples, lookahead=lookahead, check=check)
        self._replay = replay
        self._registry = registry
        self._gather = gather
        self._best = BestDrafts()

    @property
    def baseline(self) -> Baseline:
        return self._judge.baseline

    async def set_baseline(self, version: int, embedding: Tensor) -> bool:
        """Make `version` the baseline; true if it changed. Raises the errors of `RegistryView.fetch`."""
        if version == self.baseline.version:
            return False
        baseline = Baseline(version=version)
        if version != NO_DRAFT:
            folder = await self._registry.fetch(version)
            baseline = await asyncio.to_thread(_load, version, folder, embedding)
        self._judge.baseline = baseline
        return True

    def estimate(self, network: DraftNetwork, *, step: int, unseen: Sequence[Sample] = ()) -> Candidate:
        """A snapshot of `network` with its estimate, which is empty without held-out requests.

        `unseen` are requests that may be trained on, and that this network was not trained on.
        """
        candidate = snapshot(network)
        evidence = merged(self._gather(candidate, lambda: self._judge.evidence(candidate, unseen)))
        estimate = evidence.estimate
        return Candidate(
            network=candidate,
            step=step,
            estimate=replace(estimate, best_steps=self._best.update(estimate)),
            baseline_version=self.baseline.version,
            lookahead=self._judge.lookahead,
            unknown_share=_unknown_share(evidence),
        )

    def trained_length(self, network: DraftNetwork, uses: Mapping[str, int]) -> float | None:
        """Acceptance length on requests that the draft was trained on, weighted as held-out ones; None without any."""
        trained = self._replay.trained_batch(uses, count=NUM_TRAINED)
        samples = [sample for sample in trained if num_tokens(sample) > 0]
        mix = self._replay.traffic_mix()
        found = compare(samples, self._judge.verify_steps(network, samples), None, mix).gain(0.9)
        return found.candidate if found else None


def _output(sample: Sample, token_ids: Tensor) -> tuple[int, int]:
    """Tokens of a request's output, and those of them outside a draft's vocabulary."""
    output = sample.ids[sample.first_output :]
    return len(output), round(len(output) * unknown_share([output], token_ids))


def _unknown_share(evidence: Evidence) -> float | None:
    """Share of the output of today's traffic that the draft cannot propose; None without such requests."""
    rows = list(zip(evidence.estimate.pairs, evidence.outputs, strict=True))
    tokens = sum(pair.weight * num_tokens for pair, (num_tokens, _) in rows)
    return sum(pair.weight * num_unknown for pair, (_, num_unknown) in rows) / tokens if tokens else None


def _load(version: int, folder: Path, embedding: Tensor) -> Baseline:
    config, tensors = checkpoint.load(folder)
    origin = provenance_of(folder)
    return Baseline(
        version=version,
        network=checkpoint.build(config, tensors, embedding),
        tenants=tuple(map(hashes.text, origin.tenants)),
        has_more_tenants=origin.has_more_tenants,
    )

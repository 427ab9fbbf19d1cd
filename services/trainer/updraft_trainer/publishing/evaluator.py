"""The draft in training against the one that serves, on held-out requests that neither was trained on.

What is estimated is a snapshot with a checkpoint's values, so that what is published is what was measured. The steps
that the baseline needs are remembered: it does not change, and only new requests cost it a pass.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork
from updraft_trainer.data.replay import Replay
from updraft_trainer.data.sample import Sample
from updraft_trainer.publishing.decision import NO_DRAFT
from updraft_trainer.publishing.estimate import compare, num_tokens, verify_steps
from updraft_trainer.publishing.publish import Candidate, snapshot
from updraft_trainer.publishing.registry_view import RegistryView


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What serves; without a network for no draft. `steps` by trace id, as far as they are known."""

    version: int = NO_DRAFT
    network: DraftNetwork | None = None
    steps: dict[str, int] = field(default_factory=dict)


class Evaluator:
    """Compares drafts on up to `num_samples` held-out requests, with chains of `lookahead` drafts."""

    def __init__(self, replay: Replay, drafts: RegistryView, *, num_samples: int, lookahead: int) -> None:
        self._replay = replay
        self._drafts = drafts
        self._num_samples = num_samples
        self._lookahead = lookahead
        self.baseline = Baseline()

    async def follow(self, version: int, embedding: Tensor) -> bool:
        """Make `version` the baseline; whether that changed it. Raises what fetching it raises."""
        if version == self.baseline.version:
            return False
        network = None
        if version != NO_DRAFT:
            folder = await self._drafts.fetch(version)
            network = await asyncio.to_thread(_load, folder, embedding)
        self.baseline = Baseline(version=version, network=network)
        return True

    def estimate(self, network: DraftNetwork, *, step: int) -> Candidate:
        """A snapshot of `network` with its estimate; without held-out requests an empty one."""
        candidate = snapshot(network)
        samples = [
            sample for sample in self._replay.evaluation_batch(count=self._num_samples) if num_tokens(sample) > 0
        ]
        steps = verify_steps(candidate, samples, lookahead=self._lookahead)
        return Candidate(
            network=candidate,
            step=step,
            estimate=compare(samples, steps, self._baseline_steps(samples)),
            baseline_version=self.baseline.version,
            lookahead=self._lookahead,
        )

    def _baseline_steps(self, samples: list[Sample]) -> list[int] | None:
        """In the samples' order; None without a draft. Forgets samples that are no longer looked at."""
        network, known = self.baseline.network, self.baseline.steps
        if network is None:
            return None
        new = [sample for sample in samples if sample.trace_id not in known]
        fresh = verify_steps(network, new, lookahead=self._lookahead)
        steps = known | {sample.trace_id: n for sample, n in zip(new, fresh, strict=True)}
        known.clear()
        known.update({sample.trace_id: steps[sample.trace_id] for sample in samples})
        return [known[sample.trace_id] for sample in samples]


def _load(folder: Path, embedding: Tensor) -> DraftNetwork:
    config, tensors = checkpoint.load(folder)
    return checkpoint.build(config, tensors, embedding)

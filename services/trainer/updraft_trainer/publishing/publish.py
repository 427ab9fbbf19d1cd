"""Publishes a candidate as a version: writes a checkpoint folder, builds the manifest, uploads.

The uploaded weights are those that were estimated. The registry decides their phase; without its response the outcome is
unknown, and nothing is assumed.
"""

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import transfer
from updraft_artifacts.digests import file_digest, tensors_digest
from updraft_chassis.clock import Clock
from updraft_chassis.tenants import hashes
from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork
from updraft_trainer.publishing.estimate import GainEstimate
from updraft_trainer.states.state import Identity, TrainingHistory

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A draft as it would be served, and its estimate. `baseline_version` 0: no draft. Of the output of
    today's traffic, `unknown_share` is outside its vocabulary."""

    network: DraftNetwork
    step: int
    estimate: GainEstimate
    baseline_version: int
    lookahead: int
    unknown_share: float | None = None


def snapshot(network: DraftNetwork) -> DraftNetwork:
    """A copy with the values of a checkpoint, in the embedding's dtype; further training does not change it."""
    return checkpoint.build(network.config, dict(checkpoint.checkpoint_tensors(network)), network.embedding)


def evaluation(candidate: Candidate) -> registry_pb2.Evaluation:
    """The estimate in the form that the registry's gate reads."""
    estimate = candidate.estimate
    return registry_pb2.Evaluation(
        baseline_version=candidate.baseline_version,
        lookahead=candidate.lookahead,
        samples=[
            registry_pb2.EvaluationSample(
                trace_id=trace_id,
                tokens=pair.tokens,
                candidate_steps=pair.candidate_steps,
                baseline_steps=pair.baseline_steps,
                domain=domain,
                kind=pair.kind,
                weight=pair.weight,
            )
            for trace_id, domain, pair in zip(estimate.trace_ids, estimate.domains, estimate.pairs, strict=True)
        ],
    )


def save(
    candidate: Candidate, folder: Path, identity: Identity, provenance: registry_pb2.Provenance
) -> registry_pb2.Manifest:
    """Write the checkpoint into a folder, and return its manifest. Exhausted if it cannot be written."""
    checkpoint.save(candidate.network, folder)
    weights = folder / checkpoint.WEIGHTS
    specs = checkpoint.tensor_specs(checkpoint.checkpoint_tensors(candidate.network))
    return registry_pb2.Manifest(
        speculator=identity.speculator,
        digest=file_digest(weights),
        size_bytes=weights.stat().st_size,
        tensors=specs,
        tensors_digest=tensors_digest(specs),
        config_json=candidate.network.config.to_json(),
        target_fingerprint=identity.target_fingerprint,
        tokenizer_fingerprint=identity.tokenizer_fingerprint,
        draft_vocabulary_fingerprint=checkpoint.vocabulary_fingerprint(candidate.network.token_ids),
        parent_version=candidate.baseline_version,
        source=registry_pb2.SOURCE_TRAINER,
        provenance=provenance,
        evaluation=evaluation(candidate),
    )


class Publisher:
    """Uploads candidates of one speculator. `folder` is private scratch space."""

    def __init__(
        self,
        stub: "RegistryAsyncStub",
        *,
        identity: Identity,
        config_digest: str,
        folder: Path,
        clock: Clock,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` raises an error while another trainer may publish."""
        self._stub = stub
        self._identity = identity
        self._config_digest = config_digest
        self._folder = folder
        self._clock = clock
        self._check = check

    async def publish(
        self, candidate: Candidate, history: TrainingHistory, *, learning_rate: float
    ) -> registry_pb2.PublishResponse | None:
        """Upload; None if the same tensors were sent before.

        Raises the registry's error, Unavailable without a response, Exhausted if the draft cannot be written to disk, and what
        `check` raises.
        """
        manifest = await asyncio.to_thread(self._prepare, candidate, history, learning_rate)
        if manifest.tensors_digest in history.sent_digests:
            return None
        self._check()
        response = await transfer.upload(self._stub, manifest, self._folder / checkpoint.WEIGHTS, check=self._check)
        history.add_sent(manifest.tensors_digest)
        return response

    def _prepare(self, candidate: Candidate, history: TrainingHistory, learning_rate: float) -> registry_pb2.Manifest:
        shutil.rmtree(self._folder, ignore_errors=True)  # left by a killed process
        provenance = registry_pb2.Provenance(
            samples=history.num_samples,
            first_trace_id=history.first_trace_id,
            last_trace_id=history.last_trace_id,
            step=candidate.step,
            config_digest=self._config_digest,
            code_version=f"updraft/{installed_version('updraft')}",
            created_unix_ms=int(self._clock.now() * 1000),
            origin=history.origin,
            learning_rate=learning_rate,
            tenants=map(hashes.parse, history.tenants),
            has_more_tenants=history.has_more_tenants,
        )
        return save(candidate, self._folder, self._identity, provenance)

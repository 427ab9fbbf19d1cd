"""Drafts for the tiny target, brought to a registry as a trainer or a person brings them."""

from pathlib import Path

from tests.support.tiny_target import every_second_token, make_draft, save_draft
from tests.support.wait import LONG_S

from updraft.registry.v1 import registry_pb2
from updraft.registry.v1.registry_pb2_grpc import RegistryStub
from updraft_artifacts import transfer
from updraft_artifacts.digests import file_digest
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_draft import checkpoint


async def publish(
    target: Path,
    address: str,
    *,
    seed: int,
    evaluation: registry_pb2.Evaluation | None = None,
    credentials: Credentials | None = None,
) -> int:
    """Publish an untrained draft, whose vocabulary depends on the seed, too; return its version."""
    folder = target.parent / f"draft-{seed}"
    network = make_draft(target, seed=seed, token_ids=every_second_token(seed))
    tensors_digest = save_draft(network, folder)
    weights = folder / checkpoint.WEIGHTS
    manifest = registry_pb2.Manifest(
        speculator="default",
        digest=file_digest(weights),
        size_bytes=weights.stat().st_size,
        tensors=checkpoint.tensor_specs(checkpoint.checkpoint_tensors(network)),
        config_json=(folder / checkpoint.CONFIG).read_text(),
        target_fingerprint=target_fingerprint(target),
        tokenizer_fingerprint=tokenizer_fingerprint(target),
        draft_vocabulary_fingerprint=checkpoint.vocabulary_fingerprint(network.token_ids),
        source=registry_pb2.SOURCE_IMPORTED,
        tensors_digest=tensors_digest,
        evaluation=evaluation,
    )
    async with rpc.channel(address, credentials) as channel:
        return (await transfer.upload(RegistryStub(channel), manifest, weights)).version.version


async def pin(address: str, version: int) -> None:
    """Serve exactly this version."""
    async with rpc.channel(address) as channel:
        request = registry_pb2.PinRequest(speculator="default", version=version, reason="a test")
        with rpc.errors():
            await RegistryStub(channel).Pin(request, timeout=LONG_S)

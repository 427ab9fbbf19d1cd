"""A draft on disk, checked against the server that shall serve it: everything that can be wrong is found before a pause."""

from dataclasses import dataclass
from pathlib import Path

import torch

from updraft_artifacts.digests import tensors_digest
from updraft_chassis.errors import Corrupt, InvalidInput, UpdraftError
from updraft_draft import checkpoint
from updraft_draft.config import DraftConfig
from updraft_inference.engine import DraftCheckpoint
from updraft_inference.sglang_engine import checksums
from updraft_inference.sglang_engine.server import RankChecksums, ServerInfo

INITIAL_VERSION = 0


class OtherVocabularyError(InvalidInput):
    """A sound draft that only a new start of the server can serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftFingerprint:
    """A draft that the server could hold, and what it must show then, by rank, for each dtype that it may serve in."""

    version: int
    folder: Path
    tensors_digest: str
    vocabulary_fingerprint: str
    info: ServerInfo
    hashes: dict[torch.dtype, list[dict[str, str]]]

    def difference(self, served: list[RankChecksums]) -> str:
        """Why `served` is not this draft, in words; empty if it is. May read the folder again, and takes as long."""
        shown = ""
        for dtype in checksums.candidate_dtypes(self.info.dtype):
            if dtype not in self.hashes:
                try:
                    config, tensors = checkpoint.load(self.folder)
                except (UpdraftError, OSError):
                    continue
                self.hashes[dtype] = _hashes(config, tensors, dtype, self.info)
            found = _difference(self.hashes[dtype], served)
            if not found:
                return ""
            shown = shown or found
        return shown


def _difference(wanted: list[dict[str, str]], served: list[RankChecksums]) -> str:
    if len(served) != len(wanted):
        return f"{len(served)} ranks show checksums, {len(wanted)} are expected"
    for rank in served:
        names = checksums.differing(wanted[rank.tp_rank], rank)
        if names:
            return f"rank {rank.tp_rank} holds other values in {', '.join(names)}"
    return ""


def _hashes(
    config: DraftConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype, info: ServerInfo
) -> list[dict[str, str]]:
    weights = {name: tensor for name, tensor in tensors.items() if name not in checkpoint.VOCABULARY}
    return [
        checksums.expected(config, weights, dtype=dtype, device=info.device, tp=(rank, info.tp_size))
        for rank in range(info.tp_size)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What all drafts of one server share: their shape and their tokens, read once, at its start."""

    config: DraftConfig
    d2t: torch.Tensor


def read_initial_draft(folder: Path, info: ServerInfo) -> tuple[Vocabulary, DraftFingerprint]:
    """The draft that the server started with. InvalidInput if it is not in a layout of ours."""
    try:
        config, tensors = checkpoint.load(folder)
    except UpdraftError as error:
        raise InvalidInput(
            f"the draft that the SGLang server started with cannot be used: {error}. Start the server with"
            " --speculative-draft-model-path on a folder that `updraft-inference prepare-sglang` wrote, which the agent"
            " sees under the same path"
        ) from error
    if config.norm_before_residual:  # others differ from this one then, and are refused for their shape
        raise InvalidInput(f"the draft in {folder} norms its state before the residual, which SGLang's drafts do not")
    vocabulary = Vocabulary(config=config, d2t=tensors["d2t"])
    return vocabulary, _fingerprint(INITIAL_VERSION, folder, "", config, tensors, info)


def read_draft(draft: DraftCheckpoint, vocabulary: Vocabulary, info: ServerInfo) -> DraftFingerprint:
    """A checked version. InvalidInput (another shape or vocabulary) or Corrupt (damaged, another digest)."""
    config, tensors = checkpoint.load(draft.folder)
    digest = tensors_digest(checkpoint.tensor_specs(sorted(tensors.items())))
    if digest != draft.tensors_digest:
        raise Corrupt(f"version {draft.version} holds {digest}, its manifest says {draft.tensors_digest}")
    if not torch.equal(tensors["d2t"], vocabulary.d2t):
        raise OtherVocabularyError(
            f"version {draft.version} has another vocabulary than the draft that the SGLang server started with, which"
            f" reads it once: start the server anew with --speculative-draft-model-path {draft.folder}"
        )
    if config != vocabulary.config:
        raise InvalidInput(f"version {draft.version} has another shape than the draft that serves")
    return _fingerprint(draft.version, draft.folder, digest, config, tensors, info)


def _fingerprint(
    version: int,
    folder: Path,
    digest: str,
    config: DraftConfig,
    tensors: dict[str, torch.Tensor],
    info: ServerInfo,
) -> DraftFingerprint:
    likeliest = checksums.candidate_dtypes(info.dtype)[0]
    return DraftFingerprint(
        version=version,
        folder=folder,
        tensors_digest=digest,
        vocabulary_fingerprint=checkpoint.vocabulary_fingerprint(
            tensors["d2t"] + torch.arange(config.draft_vocab_size)
        ),
        info=info,
        hashes={likeliest: _hashes(config, tensors, likeliest, info)},
    )

"""Checks a draft on disk against the server that will serve it, so that every error is found before a pause."""

from dataclasses import dataclass
from pathlib import Path

import torch

from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.model_folder import read_json
from updraft_chassis.errors import Corrupt, InvalidInput, UpdraftError
from updraft_draft import checkpoint
from updraft_draft.config import DraftConfig, check_fits
from updraft_inference.engine import DraftCheckpoint, OtherShapeError
from updraft_inference.sidecar.sglang import checksums
from updraft_inference.sidecar.sglang.server import RankChecksums, ServerInfo

INITIAL_VERSION = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftFingerprint:
    """A draft that the server can hold, and the checksums that prove it: by rank, for each dtype that it may serve in."""

    draft: DraftCheckpoint
    config: DraftConfig
    info: ServerInfo
    hashes: dict[torch.dtype, list[dict[str, str]]]

    def difference(self, served: list[RankChecksums]) -> str:
        """Why `served` is not this draft; empty if it is. May read the folder again, which takes as long."""
        first_difference = ""
        for dtype in checksums.candidate_dtypes(self.info.dtype):
            if dtype not in self.hashes:
                try:
                    config, tensors = checkpoint.load(self.draft.folder)
                except (UpdraftError, OSError):
                    continue
                self.hashes[dtype] = _hashes(config, tensors, dtype, self.info)
            difference = _difference(self.hashes[dtype], served)
            if not difference:
                return ""
            first_difference = first_difference or difference
        return first_difference


def _difference(expected: list[dict[str, str]], served: list[RankChecksums]) -> str:
    if len(served) != len(expected):
        return f"{len(served)} ranks report checksums, expected {len(expected)}"
    for rank in served:
        names = checksums.differing(expected[rank.tp_rank], rank)
        if names:
            return f"rank {rank.tp_rank} has different values in {', '.join(names)}"
    return ""


def _hashes(
    config: DraftConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype, info: ServerInfo
) -> list[dict[str, str]]:
    return [
        checksums.expected_hashes(config, tensors, dtype=dtype, device=info.device, tp=(rank, info.tp_size))
        for rank in range(info.tp_size)
    ]


def read_initial_draft(folder: Path, info: ServerInfo) -> DraftFingerprint:
    """The draft that the server started with. Raises InvalidInput if its layout is not supported."""
    try:
        config, tensors = checkpoint.load(folder)
    except UpdraftError as error:
        raise InvalidInput(
            f"the draft that the SGLang server started with is not supported: {error}. Start the server with a"
            " --speculative-draft-model-path written by `updraft-inference prepare-sglang`, and make it visible to the"
            " agent under the same path"
        ) from error
    if config.norm_before_residual:  # other drafts then differ in shape and are refused
        raise InvalidInput(f"the draft in {folder} has norm_before_residual, which SGLang does not support")
    return _fingerprint(
        DraftCheckpoint(version=INITIAL_VERSION, folder=folder, tensors_digest=""), config, tensors, info
    )


def read_draft(draft: DraftCheckpoint, initial: DraftFingerprint) -> DraftFingerprint:
    """A validated version. Raises OtherShapeError if its shape differs from the initial draft's; InvalidInput if SGLang cannot
    serve it; Corrupt if it is damaged or has another digest.
    """
    config = DraftConfig.from_dict(read_json(draft.folder / checkpoint.CONFIG))
    _check_served(config, initial.config, draft.version)
    if config != initial.config:  # known before gigabytes are read, because the agent asks again and again
        raise OtherShapeError(
            f"version {draft.version} has another shape than the draft that the SGLang server started with: restart the"
            f" server with --speculative-draft-model-path {draft.folder}"
        )
    config, tensors = checkpoint.load(draft.folder)
    digest = tensors_digest(checkpoint.tensor_specs(sorted(tensors.items())))
    if digest != draft.tensors_digest:
        raise Corrupt(f"version {draft.version} has digest {digest}, but its manifest has {draft.tensors_digest}")
    return _fingerprint(draft, config, tensors, initial.info)


def _check_served(config: DraftConfig, served: DraftConfig, version: int) -> None:
    """Raise InvalidInput for a draft that no server of this target can serve."""
    if config.norm_before_residual:
        raise InvalidInput(f"version {version} has norm_before_residual, which SGLang does not support")
    reason = check_fits(config, served)
    if reason is not None:
        raise InvalidInput(f"version {version} is for another target: {reason}")


def _fingerprint(
    draft: DraftCheckpoint, config: DraftConfig, tensors: dict[str, torch.Tensor], info: ServerInfo
) -> DraftFingerprint:
    likeliest = checksums.candidate_dtypes(info.dtype)[0]
    return DraftFingerprint(
        draft=draft,
        config=config,
        info=info,
        hashes={likeliest: _hashes(config, tensors, likeliest, info)},
    )

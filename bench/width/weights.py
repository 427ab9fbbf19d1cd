"""Drafts of an 8B target's size, written to disk block by block, and their manifests.

The shapes are those of an EAGLE-3 head with 32,000 tokens (400 M parameters at hidden size 4096, 0.8 GB in bfloat16). A
successor differs as after some optimizer steps: the head is frozen, the other weights moved (see bench/fleet/weights.py).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.support.checkpoints import CONFIG, TARGET, VOCABULARY, evaluation

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts import safetensors_header
from updraft_artifacts.digests import tensors_digest

WEIGHT_STD = 0.02
UPDATE_STD = 0.008
DRAFT_VOCABULARY = 32_000
_BLOCK_VALUES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftFile:
    """A weights file and its manifest, without evaluation."""

    path: Path
    manifest: pb.Manifest


def shapes(hidden: int) -> dict[str, tuple[int, int]]:
    return {
        "fc.weight": (hidden, 3 * hidden),
        "layers.0.mlp.down_proj.weight": (hidden, 3 * hidden),
        "layers.0.mlp.gate_proj.weight": (3 * hidden, hidden),
        "layers.0.mlp.up_proj.weight": (3 * hidden, hidden),
        "layers.0.self_attn.k_proj.weight": (hidden // 4, 2 * hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, hidden),
        "layers.0.self_attn.q_proj.weight": (hidden, 2 * hidden),
        "layers.0.self_attn.v_proj.weight": (hidden // 4, 2 * hidden),
        "lm_head.weight": (DRAFT_VOCABULARY, hidden),
    }


def write(path: Path, hidden: int, *, seed: int, number: int) -> DraftFile:
    """Write version `number` of a sequence of drafts."""
    file_digest, specs = hashlib.sha256(), []
    with path.open("wb") as file:
        header = safetensors_header.header((name, "BF16", shape) for name, shape in shapes(hidden).items())
        file.write(header)
        file_digest.update(header)
        for index, (name, shape) in enumerate(shapes(hidden).items()):
            digest = hashlib.sha256()
            updates = 0 if name == "lm_head.weight" else number - 1
            for block in _blocks(shape[0] * shape[1], seed=[seed, index], updates=updates):
                digest.update(block)
                file_digest.update(block)
                file.write(block)
            specs.append(pb.TensorSpec(name=name, dtype="BF16", shape=shape, digest=f"sha256:{digest.hexdigest()}"))
    first = number == 1
    manifest = pb.Manifest(
        speculator="default",
        digest=f"sha256:{file_digest.hexdigest()}",
        size_bytes=path.stat().st_size,
        tensors=specs,
        tensors_digest=tensors_digest(specs),
        config_json=json.dumps(json.loads(CONFIG) | {"hidden_size": hidden}),
        target_fingerprint=TARGET,
        draft_vocabulary_fingerprint=VOCABULARY,
        source=pb.SOURCE_INITIAL if first else pb.SOURCE_TRAINER,
        parent_version=number - 1,
        evaluation=None if first else evaluation(baseline=number - 1),
    )
    return DraftFile(path=path, manifest=manifest)


def _blocks(count: int, *, seed: list[int], updates: int) -> Iterator[bytes]:
    rngs = [np.random.default_rng([*seed, update]) for update in range(updates + 1)]
    for begin in range(0, count, _BLOCK_VALUES):
        size = min(count - begin, _BLOCK_VALUES)
        values = rngs[0].standard_normal(size, dtype=np.float32) * np.float32(WEIGHT_STD)
        for rng in rngs[1:]:
            values += rng.standard_normal(size, dtype=np.float32) * np.float32(UPDATE_STD)
        yield bfloat16(values)


def bfloat16(values: NDArray[np.float32]) -> bytes:
    """Round to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()

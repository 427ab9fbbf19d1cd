"""Small draft checkpoints written by hand: safetensors is a length, a JSON header, and the bytes.

No torch.
"""

import hashlib
import json
import math
import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from updraft.registry.v1 import registry_pb2
from updraft_artifacts.digests import vocabulary_fingerprint

TARGET = "sha256:" + "a" * 64
OTHER_TARGET = "sha256:" + "b" * 64
VOCABULARY = vocabulary_fingerprint([2 * index for index in range(16)])
"""Of the d2t that `draft` writes."""
BF16_NAN = b"\xc0\x7f"
CONFIG = json.dumps(
    {
        "architectures": ["LlamaForCausalLMEagle3"],
        "vocab_size": 64,
        "draft_vocab_size": 16,
        "updraft": {"aux_layers": [2, 4, 5]},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A weights file in memory, and what but its manifest states of it."""

    data: bytes
    tensors: tuple[registry_pb2.TensorSpec, ...]

    @property
    def digest(self) -> str:
        return sha256(self.data)

    def manifest(self, speculator: str = "default", **fields: object) -> registry_pb2.Manifest:
        """A manifest that fits; `fields` override it."""
        values: dict[str, object] = {
            "speculator": speculator,
            "digest": self.digest,
            "size_bytes": len(self.data),
            "tensors": self.tensors,
            "tensors_digest": tensors_digest(self.tensors),
            "config_json": CONFIG,
            "target_fingerprint": TARGET,
            "tokenizer_fingerprint": "sha256:" + "d" * 64,
            "draft_vocabulary_fingerprint": VOCABULARY,
            "source": registry_pb2.SOURCE_IMPORTED,
        }
        return registry_pb2.Manifest(**(values | fields))  # type: ignore[arg-type] # keyword by keyword, on purpose


def draft(seed: int = 0, *, columns: int = 32, fc: bytes | None = None) -> Checkpoint:
    """A tiny draft: finite bf16 weights that depend on the seed, with a d2t and a t2d.

    `fc` replaces its first tensor.
    """
    rng = random.Random(seed)
    weights = _bf16(rng, 8 * columns) if fc is None else fc
    return checkpoint(
        {
            "d2t": ("I64", (16,), struct.pack("<16q", *range(16))),
            "fc.weight": ("BF16", (8, len(weights) // 16), weights),
            "norm.weight": ("F32", (8,), struct.pack("<8f", *(rng.random() for _ in range(8)))),
            "t2d": ("BOOL", (64,), bytes([1] * 16 + [0] * 48)),
        }
    )


def checkpoint(tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> Checkpoint:
    """A file of these tensors, by name: dtype, shape, bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    return Checkpoint(
        data=safetensors(header, body),
        tensors=tuple(
            registry_pb2.TensorSpec(name=name, dtype=dtype, shape=shape, digest=sha256(data))
            for name, (dtype, shape, data) in tensors.items()
        ),
    )


def safetensors(header: object, body: bytes) -> bytes:
    """The bytes of a file with this header, sound or not."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensors_digest(tensors: Sequence[registry_pb2.TensorSpec]) -> str:
    """As the contract defines it."""
    lines = [
        f"{t.name}\0{t.dtype}\0{','.join(map(str, t.shape))}\0{t.digest.removeprefix('sha256:')}\n"
        for t in sorted(tensors, key=lambda t: t.name)
    ]
    return sha256("".join(lines).encode())


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def evaluation(
    *, baseline: int = 0, gain: float = 1.5, num_samples: int = 12, tokens: int = 60, lookahead: int = 3
) -> registry_pb2.Evaluation:
    """An evaluation whose candidate needs about `1/gain` of the baseline's steps, with some noise between requests."""
    rng = random.Random(baseline * 1000 + num_samples)
    samples = []
    for i in range(num_samples):
        length = tokens + rng.randrange(tokens)
        baseline_steps = length if baseline == 0 else math.ceil(length / 2)
        steps = max(1, min(length, round(baseline_steps / gain * rng.uniform(0.95, 1.05))))
        samples.append(
            registry_pb2.EvaluationSample(
                trace_id=f"trace-{i}", tokens=length, candidate_steps=steps, baseline_steps=baseline_steps
            )
        )
    return registry_pb2.Evaluation(baseline_version=baseline, samples=samples, lookahead=lookahead)


def _bf16(rng: random.Random, num_values: int) -> bytes:
    """Values between 2**-8 and 2 of either sign: no exponent is all ones."""
    return b"".join(
        struct.pack("<H", rng.randrange(2) << 15 | rng.randrange(119, 128) << 7 | rng.randrange(128))
        for _ in range(num_values)
    )

"""Draft folders that tests.support.fake_engine loads: any bytes are weights, and their sha256 is also the tensors digest."""

import hashlib
from pathlib import Path

from google.protobuf import json_format

from updraft.registry.v1 import registry_pb2


def manifest(content: bytes, *, target: str = "sha256:target", speculator: str = "default") -> registry_pb2.Manifest:
    """The manifest of these weights."""
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return registry_pb2.Manifest(
        speculator=speculator,
        digest=digest,
        tensors_digest=digest,
        size_bytes=len(content),
        config_json="{}",
        target_fingerprint=target,
        tokenizer_fingerprint="sha256:tokenizer",
    )


def write_version(folder: Path, version: int, content: bytes, *, target: str = "sha256:target") -> Path:
    """`folder`/<version> as a download leaves it."""
    path = folder / str(version)
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(content)
    (path / "config.json").write_text("{}")
    (path / "manifest.json").write_text(json_format.MessageToJson(manifest(content, target=target)))
    return path

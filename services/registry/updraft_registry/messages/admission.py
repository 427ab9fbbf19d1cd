"""Checks of a manifest before its weights are received. Pure; `checkpoint` checks the weights themselves."""

import json
import re

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput, NotFound
from updraft_chassis.settings import NAME
from updraft_registry.rollout.version import Speculator

_FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Dtypes by their names in config.json, with their names in safetensors."""

MAX_MANIFEST_BYTES = 1024 * 1024
"""A manifest has to fit into one message with the rest of its version."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def check_name(speculator: str) -> str:
    """Return the name; InvalidInput if it is not valid."""
    if not re.fullmatch(NAME, speculator):
        raise InvalidInput(
            f"{speculator[:80]!r} is not a valid speculator name: 1 to 63 of a-z, 0-9, '-', '.', '_', "
            "starting and ending with a letter or digit"
        )
    return speculator


def check_length(manifest: registry_pb2.Manifest) -> None:
    """Raise InvalidInput for a manifest that does not fit into a response."""
    if manifest.ByteSize() > MAX_MANIFEST_BYTES:
        raise InvalidInput(
            f"a manifest of {manifest.ByteSize()} bytes, {manifest.evaluation.ByteSize()} of them the evaluation; "
            f"at most {MAX_MANIFEST_BYTES}"
        )


def check_manifest(manifest: registry_pb2.Manifest, *, max_bytes: int) -> None:
    """Raise InvalidInput, with the field, unless the manifest is complete and the size is within bounds."""
    check_name(manifest.speculator)
    for field in ("digest", "tensors_digest"):
        value = getattr(manifest, field)
        if not _DIGEST.fullmatch(value):
            raise InvalidInput(f"{field} must be 'sha256:' and 64 hexadecimal digits, got {value[:80]!r}")
    for field in ("target_fingerprint", "draft_vocabulary_fingerprint"):
        if not getattr(manifest, field):
            raise InvalidInput(f"{field} is empty: a draft works only with its target")
    if manifest.source not in registry_pb2.Source.values() or manifest.source == registry_pb2.SOURCE_UNSPECIFIED:
        raise InvalidInput(f"source is {manifest.source}; expected INITIAL, TRAINER or IMPORTED")
    if not 0 < manifest.size_bytes <= max_bytes:
        raise InvalidInput(
            f"a draft of {manifest.size_bytes} bytes; this registry accepts 1 to {max_bytes} "
            "(UPDRAFT_REGISTRY_MAX_DRAFT_BYTES)"
        )
    _check_config(manifest)


def check_speculator(manifest: registry_pb2.Manifest, speculator: Speculator) -> None:
    """Raise InvalidInput unless the draft is for the speculator's target, NotFound for an unknown parent."""
    if manifest.parent_version > speculator.latest:  # numbers have no gaps
        raise NotFound(f"the parent, version {manifest.parent_version}, does not exist in {speculator.name}")
    target = manifest.target_fingerprint
    if speculator.target and target != speculator.target:
        raise InvalidInput(f"the target of this draft is {target}, but {speculator.name} is for {speculator.target}")


def _check_config(manifest: registry_pb2.Manifest) -> None:
    """Refuse weights in another dtype than the config states, because engines would silently convert them.

    Quantised weights differ on purpose, and their config says so.
    """
    try:
        config = json.loads(manifest.config_json)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise InvalidInput("config_json is not a JSON object; engines need the draft's config.json to load the weights")
    stated = config.get("dtype") or config.get("torch_dtype")
    if not isinstance(stated, str) or "quantization_config" in config:
        return
    stored = _FLOATS.get(stated.removeprefix("torch."))
    for tensor in manifest.tensors:
        if tensor.dtype in _FLOATS.values() and tensor.dtype != stored:
            raise InvalidInput(
                f"tensor {tensor.name} is {tensor.dtype}, but config.json states {stated}: engines would convert it; "
                "publish the weights in the dtype to serve"
            )

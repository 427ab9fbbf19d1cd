"""What a manifest must say before a byte of its weights is taken.

Pure: what a file really holds is `checkpoint`'s business.
"""

import json
import re

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput, NotFound
from updraft_registry.rollout.version import Lineage, Speculator

_FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""As configs call them, and as safetensors does."""

MAX_MANIFEST_BYTES = 1024 * 1024
"""A manifest travels whole in one message, with what else is said of its version."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

# A folder, a label value and part of a Kubernetes name: no separators, no capitals, never only dots.
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


def check_name(speculator: str) -> str:
    """Return the speculator's name; InvalidInput if it is none."""
    if not _NAME.fullmatch(speculator):
        raise InvalidInput(
            f"{speculator[:80]!r} is no name of a speculator: 1 to 63 of a-z, 0-9, '-', '.', '_', "
            "starting and ending with a letter or digit"
        )
    return speculator


def check_length(manifest: registry_pb2.Manifest) -> None:
    """Raise InvalidInput for a manifest that answers would have no room for."""
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
            raise InvalidInput(f"{field} is empty: a draft is only good for the target it was made for")
    if manifest.source not in registry_pb2.Source.values() or manifest.source == registry_pb2.SOURCE_UNSPECIFIED:
        raise InvalidInput(f"source is {manifest.source}; say INITIAL, TRAINER or IMPORTED")
    if not 0 < manifest.size_bytes <= max_bytes:
        raise InvalidInput(
            f"a draft of {manifest.size_bytes} bytes; this registry takes 1 to {max_bytes} "
            "(UPDRAFT_REGISTRY_MAX_DRAFT_BYTES)"
        )
    _check_config(manifest.config_json)
    _check_dtypes(manifest)


def check_lineage(manifest: registry_pb2.Manifest, speculator: Speculator) -> None:
    """Raise InvalidInput if the draft cannot follow the speculator's first one, NotFound if its parent was never published."""
    if manifest.parent_version > speculator.latest:  # numbers are given without gaps
        raise NotFound(f"the parent, version {manifest.parent_version}, does not exist in {speculator.name}")
    if speculator.lineage is None:
        return
    _check_same("target", manifest.target_fingerprint, speculator.lineage.target_fingerprint, speculator.name)
    _check_same(
        "draft vocabulary",
        manifest.draft_vocabulary_fingerprint,
        speculator.lineage.draft_vocabulary_fingerprint,
        speculator.name,
    )


def foreign(lineage: Lineage, *, target: str, draft_vocabulary: str) -> str:
    """Why a pod cannot serve this lineage, or empty.

    An empty fingerprint is not known yet and contradicts nothing.
    """
    for what, found, expected in (
        ("target", target, lineage.target_fingerprint),
        ("draft vocabulary", draft_vocabulary, lineage.draft_vocabulary_fingerprint),
    ):
        if found and found != expected:
            return f"its {what} is {found}, the drafts here are for {expected}"
    return ""


def _check_same(what: str, found: str, expected: str, speculator: str) -> None:
    if found != expected:
        raise InvalidInput(f"the {what} of this draft is {found}, {speculator} is for {expected}")


def _check_config(config_json: str) -> None:
    try:
        is_object = isinstance(json.loads(config_json), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise InvalidInput(
            "config_json is no JSON object; engines load the weights together with the draft's config.json"
        )


def _check_dtypes(manifest: registry_pb2.Manifest) -> None:
    """Engines convert weights to the dtype of the config without a word: then they would not serve what was published.

    Quantised weights are stored in another dtype than the config's on purpose, and say so.
    """
    config = json.loads(manifest.config_json)
    stated = config.get("dtype") or config.get("torch_dtype")
    if not isinstance(stated, str) or "quantization_config" in config:
        return
    stored = _FLOATS.get(stated.removeprefix("torch."))
    for tensor in manifest.tensors:
        if tensor.dtype in _FLOATS.values() and tensor.dtype != stored:
            raise InvalidInput(
                f"tensor {tensor.name} is {tensor.dtype}, config.json says {stated}: engines would convert it; "
                "publish what is to be served"
            )

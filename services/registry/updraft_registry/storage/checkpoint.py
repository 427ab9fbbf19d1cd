"""Checks a weights file against its manifest, from the safetensors bytes, without torch.

The file was hashed during its upload. Here every tensor is hashed and scanned for values that are not finite, in one pass
and block by block, so that memory does not grow with the draft.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import safetensors_header
from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.safetensors_header import TensorSpan
from updraft_chassis.errors import InvalidInput

_BLOCK_BYTES = 8 * 1024 * 1024

# Integer type of the same width, and the bits that are all set in an infinity or NaN. E4M3 has no infinity,
# and its one NaN has all bits but the sign.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}


def verify(path: Path, manifest: registry_pb2.Manifest) -> None:
    """Raise InvalidInput unless the file holds exactly the manifest's tensors, all of them finite."""
    declared = {spec.name: spec for spec in manifest.tensors}
    with path.open("rb") as file:
        tensors = safetensors_header.read(file)
        if set(declared) != {tensor.name for tensor in tensors} or len(declared) != len(manifest.tensors):
            raise InvalidInput(_different_names(declared, tensors))
        for tensor in tensors:
            _verify_tensor(file, tensor, declared[tensor.name])
    actual = tensors_digest(manifest.tensors)
    if actual != manifest.tensors_digest:
        raise InvalidInput(
            f"the tensors' digest is {actual}, but the manifest states {manifest.tensors_digest or 'none'}"
        )


def _different_names(declared: Iterable[str], tensors: Iterable[TensorSpan]) -> str:
    found = {tensor.name for tensor in tensors}
    missing, unknown = sorted(set(declared) - found), sorted(found - set(declared))
    if not missing and not unknown:
        return "the manifest names a tensor twice"
    return f"the file lacks the tensors {missing[:5]} of its manifest, and has {unknown[:5]} in addition"


def _verify_tensor(file: BinaryIO, tensor: TensorSpan, declared: registry_pb2.TensorSpec) -> None:
    actual = f"{tensor.dtype} {list(tensor.shape)}"
    expected = f"{declared.dtype} {list(declared.shape)}"
    if actual != expected:
        raise InvalidInput(f"tensor {tensor.name} is {actual} in the file, but {expected} in the manifest")
    digest = hashlib.sha256()
    num_bad = 0
    file.seek(tensor.begin)
    for block in _blocks(file, tensor.end - tensor.begin):
        digest.update(block)
        num_bad += _count_not_finite(block, tensor.dtype)
    if num_bad:
        raise InvalidInput(f"tensor {tensor.name} holds {num_bad} values that are not finite")
    if f"sha256:{digest.hexdigest()}" != declared.digest:
        raise InvalidInput(
            f"tensor {tensor.name} is sha256:{digest.hexdigest()}, but the manifest states {declared.digest}"
        )


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        block = file.read(min(num_bytes, _BLOCK_BYTES))  # a multiple of every item size, so that no value is cut
        if not block:
            raise InvalidInput("the file was truncated while it was read")
        yield block
        num_bytes -= len(block)


def _count_not_finite(block: bytes, dtype: str) -> int:
    if dtype not in _NOT_FINITE:
        return 0
    integers, mask = _NOT_FINITE[dtype]
    bits: npt.NDArray[np.unsignedinteger[Any]] = np.frombuffer(block, dtype=integers)
    return int(np.count_nonzero((bits & integers(mask)) == mask))

"""Is a weights file what its manifest says, and sound? Read from the safetensors bytes themselves; no torch.

The whole file was hashed while it arrived; here every tensor is hashed again on its own and scanned for
values that are not finite, in one pass over the file, one block at a time: memory does not grow with the
draft.
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
    found = tensors_digest(manifest.tensors)
    if found != manifest.tensors_digest:
        raise InvalidInput(f"the tensors' digest is {found}, the manifest says {manifest.tensors_digest or 'none'}")


def _different_names(declared: Iterable[str], tensors: Iterable[TensorSpan]) -> str:
    found = {tensor.name for tensor in tensors}
    missing, unknown = sorted(set(declared) - found), sorted(found - set(declared))
    if not missing and not unknown:
        return "the manifest names a tensor twice"
    return f"the file lacks the tensors {missing[:5]} of its manifest and holds {unknown[:5]} besides"


def _verify_tensor(file: BinaryIO, tensor: TensorSpan, declared: registry_pb2.TensorSpec) -> None:
    found = f"{tensor.dtype} {list(tensor.shape)}"
    expected = f"{declared.dtype} {list(declared.shape)}"
    if found != expected:
        raise InvalidInput(f"tensor {tensor.name} is {found} in the file, the manifest says {expected}")
    digest = hashlib.sha256()
    num_bad = 0
    file.seek(tensor.begin)
    for block in _blocks(file, tensor.end - tensor.begin):
        digest.update(block)
        num_bad += _count_not_finite(block, tensor.dtype)
    if num_bad:
        raise InvalidInput(f"tensor {tensor.name} holds {num_bad} values that are not finite")
    if f"sha256:{digest.hexdigest()}" != declared.digest:
        raise InvalidInput(f"tensor {tensor.name} is sha256:{digest.hexdigest()}, the manifest says {declared.digest}")


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        block = file.read(min(num_bytes, _BLOCK_BYTES))  # a multiple of every item size, so that no value is cut
        if not block:
            raise InvalidInput("the file became shorter while it was read")
        yield block
        num_bytes -= len(block)


def _count_not_finite(block: bytes, dtype: str) -> int:
    if dtype not in _NOT_FINITE:
        return 0
    integers, mask = _NOT_FINITE[dtype]
    bits: npt.NDArray[np.unsignedinteger[Any]] = np.frombuffer(block, dtype=integers)
    return int(np.count_nonzero((bits & integers(mask)) == mask))

"""Is a weights file what its manifest says, and sound? Read from the safetensors bytes themselves; no torch.

The whole file was hashed while it arrived; here every tensor is hashed again on its own and scanned for
values that are not finite, in one pass over the file, one block at a time: memory does not grow with the
draft.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from updraft.registry.v1 import registry_pb2
from updraft_chassis.errors import InvalidInput

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""A draft has tens of tensors, some kilobytes of header; safetensors itself stops at 100 MB."""

_BLOCK_BYTES = 8 * 1024 * 1024

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def verify(path: Path, manifest: registry_pb2.Manifest) -> None:
    """Raise InvalidInput unless the file holds exactly the manifest's tensors, all of them finite."""
    declared = {spec.name: spec for spec in manifest.tensors}
    with path.open("rb") as file:
        tensors, start = _read_header(file)
        if set(declared) != {tensor.name for tensor in tensors} or len(declared) != len(manifest.tensors):
            raise InvalidInput(_different_names(declared, tensors))
        for tensor in tensors:
            _verify_tensor(file, start, tensor, declared[tensor.name])
    found = tensors_digest(manifest.tensors)
    if found != manifest.tensors_digest:
        raise InvalidInput(f"the tensors' digest is {found}, the manifest says {manifest.tensors_digest or 'none'}")


def tensors_digest(specs: Iterable[registry_pb2.TensorSpec]) -> str:
    """ "sha256:..." over the specs sorted by name: what an engine can compute from what it holds."""
    digest = hashlib.sha256()
    for spec in sorted(specs, key=lambda spec: spec.name):
        shape = ",".join(str(size) for size in spec.shape)
        digest.update(f"{spec.name}\0{spec.dtype}\0{shape}\0{spec.digest.removeprefix('sha256:')}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _different_names(declared: Iterable[str], tensors: Iterable[_Tensor]) -> str:
    found = {tensor.name for tensor in tensors}
    missing, unknown = sorted(set(declared) - found), sorted(found - set(declared))
    if not missing and not unknown:
        return "the manifest names a tensor twice"
    return f"the file lacks the tensors {missing[:5]} of its manifest and holds {unknown[:5]} besides"


def _verify_tensor(file: BinaryIO, start: int, tensor: _Tensor, declared: registry_pb2.TensorSpec) -> None:
    found = f"{tensor.dtype} {list(tensor.shape)}"
    expected = f"{declared.dtype} {list(declared.shape)}"
    if found != expected:
        raise InvalidInput(f"tensor {tensor.name} is {found} in the file, the manifest says {expected}")
    digest = hashlib.sha256()
    num_bad = 0
    file.seek(start + tensor.begin)
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


def _read_header(file: BinaryIO) -> tuple[list[_Tensor], int]:
    """The tensors in file order, without gaps up to the end of the file, and where their data starts."""
    size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise InvalidInput(f"a file of {size} bytes is no safetensors file")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise InvalidInput(f"a header of {header_bytes} bytes in a file of {size} bytes: no safetensors file")
    tensors = sorted(_parse(file.read(header_bytes)), key=lambda tensor: tensor.begin)
    end = 0
    for tensor in tensors:
        if tensor.begin != end:
            raise InvalidInput(f"tensor {tensor.name} starts at byte {tensor.begin}, expected {end}")
        end = tensor.end
    if 8 + header_bytes + end != size:
        raise InvalidInput(f"the file has {size} bytes, its header describes {8 + header_bytes + end}")
    return tensors, 8 + header_bytes


def _parse(header: bytes) -> Iterator[_Tensor]:
    try:
        content = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the safetensors header is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidInput("the safetensors header is no JSON object")
    for name, entry in content.items():
        if name != "__metadata__":
            yield _tensor(name, entry)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _tensor(name: str, entry: Any) -> _Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        is_sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        is_sound = is_sound and end - begin == math.prod(shape) * _ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise InvalidInput(f"the safetensors header describes tensor {name!r} as {str(entry)[:200]}")
    return _Tensor(name=name, dtype=dtype, shape=shape, begin=begin, end=end)

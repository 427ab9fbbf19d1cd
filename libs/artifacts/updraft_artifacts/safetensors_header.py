"""Reads and writes safetensors headers, without torch.

Reading is strict: tensors must follow each other without gaps up to the end of the file, so that every byte belongs either to
the header or to one tensor.
"""

import json
import math
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from updraft_chassis.errors import Corrupt, InvalidInput

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""A draft has tens of tensors and a header of some kilobytes; safetensors itself allows 100 MB."""

_MAX_CHECKPOINT_HEADER_BYTES = 32 * 1024 * 1024
"""A shard of experts has tens of thousands of tensors, each with about 130 bytes."""

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpan:
    """One tensor; `begin` and `end` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read(file: BinaryIO) -> list[TensorSpan]:
    """The tensors in file order; InvalidInput unless it is a complete safetensors file."""
    size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise InvalidInput(f"a file of {size} bytes is no safetensors file")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise InvalidInput(f"a header of {header_bytes} bytes in a file of {size} bytes: no safetensors file")
    start = end = 8 + header_bytes
    tensors = sorted(_parse(file.read(header_bytes), start), key=lambda tensor: (tensor.begin, tensor.end))
    for tensor in tensors:
        if tensor.begin != end:  # the message counts as the header does, from the end of the header
            raise InvalidInput(f"tensor {tensor.name} starts at byte {tensor.begin - start}, expected {end - start}")
        end = tensor.end
    if end != size:
        raise InvalidInput(f"the file has {size} bytes, its header describes {end}")
    return tensors


def names(prefix: bytes, size: int) -> list[str]:
    """Names of the tensors in a checkpoint's file of `size` bytes, which starts with `prefix`: the whole header, or more."""
    return [name for name in _content(prefix[8 : length(prefix, size)]) if name != "__metadata__"]


def find(wanted: Collection[str], prefix: bytes, size: int) -> dict[str, TensorSpan]:
    """Those of the wanted tensors that the file holds, as for `names`; the others may have any dtype.

    InvalidInput if the header is damaged, Corrupt if a wanted tensor is not within the file.
    """
    end = length(prefix, size)
    content = _content(prefix[8:end])
    spans = {name: _tensor(name, content[name], end) for name in wanted if name in content}
    for span in spans.values():
        if span.end > size:
            raise Corrupt(f"it has {size} bytes, but {span.name} ends at byte {span.end}")
    return spans


def length(prefix: bytes, size: int) -> int:
    """Bytes of a checkpoint's header, with its length in front.

    Corrupt unless a file of `size` bytes can have it, InvalidInput if it is too large to be read into memory.
    """
    (header_bytes,) = struct.unpack("<Q", prefix[:8]) if len(prefix) >= 8 else (size,)
    if header_bytes > size - 8:
        raise Corrupt(f"it has {size} bytes and starts with {prefix[:8]!r}, which is no whole safetensors file")
    if header_bytes > _MAX_CHECKPOINT_HEADER_BYTES:
        raise InvalidInput(f"its header has {header_bytes:,} bytes, supported are {_MAX_CHECKPOINT_HEADER_BYTES:,}")
    return 8 + int(header_bytes)


def header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The header of a file whose tensors (name, dtype, shape) follow each other in this order."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned, because readers map the tensors in place
    return struct.pack("<Q", len(text)) + text


def _parse(header: bytes, start: int) -> Iterator[TensorSpan]:
    for name, entry in _content(header).items():
        if name != "__metadata__":
            yield _tensor(name, entry, start)


def _content(header: bytes) -> dict[str, Any]:
    try:
        content = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the safetensors header is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidInput("the safetensors header is not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _tensor(name: str, entry: Any, start: int) -> TensorSpan:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        is_sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        is_sound = is_sound and end - begin == math.prod(shape) * ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise InvalidInput(f"the safetensors header describes tensor {name!r} as {str(entry)[:200]}")
    return TensorSpan(name=name, dtype=dtype, shape=shape, begin=start + begin, end=start + end)

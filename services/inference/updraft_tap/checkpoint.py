"""Reads the folder of a draft: config.json and model.safetensors. Only the standard library and torch.

The file may be cut off, huge or hostile, so every offset is checked against the file before it is used.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_CONFIG = 1 << 20
_MAX_HEADER = 1 << 20
"""A draft has some twenty tensors, each of which takes a hundred bytes."""

_PIECE = 1 << 20
"""Bytes that are read at a time."""


class UnreadableError(Exception):
    """The folder holds no draft that can be read; the message says why."""


def read(folder: Path, max_bytes: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors, which share one copy of the file, and take `max_bytes` at most. Raises UnreadableError."""
    most = None if max_bytes is None else 8 + _MAX_HEADER + max_bytes
    with _unreadable():
        return read_config(folder), _tensors(_buffer(folder / "model.safetensors", most))


def read_config(folder: Path) -> dict[str, Any]:
    """The config alone. Raises UnreadableError."""
    with _unreadable():
        config = json.loads(_contents(folder / "config.json", _MAX_CONFIG))
        if not isinstance(config, dict):
            raise UnreadableError("config.json is not an object")
        return config


@contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        struct.error,
        OverflowError,
        RuntimeError,  # no memory for it, or a header nested too deep
        MemoryError,
    ) as error:
        raise UnreadableError(str(error) or type(error).__name__) from error


def _contents(file: Path, most: int) -> bytes:
    _check_size(file, most)
    return file.read_bytes()


def _buffer(file: Path, most: int | None) -> Tensor:
    """All bytes of the file, read in pieces into memory that nobody has touched, so that the engine's thread goes on: a copy in
    Python, or one call for all of them, would stop it for a millisecond per megabyte."""
    data, done = torch.empty(_check_size(file, most), dtype=torch.uint8, device="cpu"), 0
    view = data.numpy().data
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(view[done : done + _PIECE]):
            done += count
    return data[:done]


def _check_size(file: Path, most: int | None) -> int:
    """A device or a pipe in place of the file has no end, so it is not read at all."""
    size = file.stat().st_size
    if not file.is_file():
        raise UnreadableError(f"{file.name} is no file")
    if most is not None and size > most:
        raise UnreadableError(f"{file.name} has {size} bytes, but at most {most} can belong to this draft")
    return size


def _tensors(data: Tensor) -> dict[str, Tensor]:
    raw = data.numpy().data
    (length,) = struct.unpack_from("<Q", raw)
    if length > min(_MAX_HEADER, len(data) - 8):
        raise UnreadableError(f"model.safetensors ends within its header, or that has more than {_MAX_HEADER} bytes")
    header: dict[str, Any] = json.loads(bytes(raw[8 : 8 + length]))
    header.pop("__metadata__", None)
    return {name: _tensor(name, entry, data, 8 + length) for name, entry in header.items()}


def _tensor(name: str, entry: Mapping[str, Any], data: Tensor, base: int) -> Tensor:
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    count = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise UnreadableError(f"{name} has the shape {shape}")
        count *= size
    if not 0 <= start <= end <= len(data) - base or end - start != count * dtype.itemsize:
        raise UnreadableError(f"{name} does not fit model.safetensors")
    if not count:
        return torch.empty(shape, dtype=dtype)
    raw = data[base + start : base + end]
    if (base + start) % dtype.itemsize:
        raw = raw.clone()  # a view of another dtype must be aligned
    return raw.view(dtype).view(shape)

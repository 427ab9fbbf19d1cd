"""Finds the tensors in a file of `torch.save`, without torch and without running anything that the file says.

Such a file is a zip archive: a pickle that names the tensors, and the bytes of each of their storages, not compressed. A pickle
is a program. Here it is read by an interpreter that knows the instructions and the three functions that a dictionary of
tensors needs, and calls nothing else; whatever else there is refuses the file. The bytes stay where they are.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from updraft_artifacts.safetensors_header import ITEM_BYTES, TensorSpan
from updraft_chassis.errors import InvalidInput

WEIGHTS = "pytorch_model.bin"

_MAX_PICKLE_BYTES = 4 * 1024 * 1024
"""A draft has tens of tensors, with about 200 bytes each."""

_MAX_DIMENSIONS = 8

_MAX_BYTEORDER_BYTES = 16
_ENCRYPTED_OR_PATCH = 0x61

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Precedes each file in a zip archive: a signature, and the lengths of the file's name and of an extra field."""

_DTYPES = {
    "BFloat16Storage": "BF16", "HalfStorage": "F16", "FloatStorage": "F32", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_MARK = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Storage:
    dtype: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle refers to, which is never looked up."""

    name: str


def read(path: Path) -> list[TensorSpan]:
    """Return the tensors of a file; InvalidInput if it is damaged, too old, or holds anything but contiguous tensors."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            pickle = _pickle(archive, members)
            places = {name: _place(file, info) for name, info in members.items()}
    except zipfile.BadZipFile:
        raise InvalidInput(
            f"{path.name} is not a file of torch.save from torch 1.6 or later; save the draft as safetensors"
        ) from None
    except (OSError, struct.error, EOFError, ValueError, OverflowError, NotImplementedError) as error:
        raise InvalidInput(f"{path.name} is damaged: {error}") from None
    try:
        content = _Interpreter(places).run(pickle)
        return [_named(name, tensor) for name, tensor in content.items()]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise InvalidInput(f"the pickle in {path.name} is damaged: {error}") from None
    except InvalidInput as error:
        raise InvalidInput(f"{path.name} holds more than tensors: {error}") from None


def _pickle(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> bytes:
    """Read the pickle. All members are stored as they are, so that reading one takes no more than its checked size."""
    if not all(_is_plain(info) for info in members.values()) or "data.pkl" not in members:
        raise zipfile.BadZipFile
    order = members.get("byteorder")
    if order is not None and _content(archive, order, _MAX_BYTEORDER_BYTES) != b"little":
        raise InvalidInput("its numbers are not little-endian")
    return _content(archive, members["data.pkl"], _MAX_PICKLE_BYTES)


def _is_plain(info: zipfile.ZipInfo) -> bool:
    is_stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    return is_stored and not info.flag_bits & _ENCRYPTED_OR_PATCH


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int) -> bytes:
    if info.file_size > max_bytes:
        raise zipfile.BadZipFile
    return archive.read(info)


def _place(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of an archive's member begin and end in the file."""
    size = file.seek(0, 2)
    file.seek(info.header_offset)
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    begin = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    if signature != b"PK\3\4" or begin + info.file_size > size:
        raise zipfile.BadZipFile
    return begin, begin + info.file_size


def _named(name: Any, tensor: Any) -> TensorSpan:
    if not isinstance(name, str) or not isinstance(tensor, TensorSpan):
        raise InvalidInput(f"{str(name)[:100]!r} is a {type(tensor).__name__}")
    return TensorSpan(name=name, dtype=tensor.dtype, shape=tensor.shape, begin=tensor.begin, end=tensor.end)


class _Interpreter:
    """The part of pickle's stack machine that dictionaries of tensors need. Calls only describe tensors."""

    def __init__(self, places: Mapping[str, tuple[int, int]]) -> None:
        self._places = places
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"), self._push),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda arg: self._push(self._memo[arg])),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "MARK": lambda _: self._push(_MARK),
            "NONE": lambda _: self._push(None),
            "NEWTRUE": lambda _: self._push(True),  # noqa: FBT003 - a value
            "NEWFALSE": lambda _: self._push(False),  # noqa: FBT003 - a value
            "EMPTY_DICT": lambda _: self._push({}),
            "EMPTY_TUPLE": lambda _: self._push(()),
            "TUPLE": lambda _: self._push(tuple(self._since_mark())),
            "TUPLE1": lambda _: self._push(tuple(self._pop(1))),
            "TUPLE2": lambda _: self._push(tuple(self._pop(2))),
            "TUPLE3": lambda _: self._push(tuple(self._pop(3))),
            "SETITEM": lambda _: self._set(self._pop(2)),
            "SETITEMS": lambda _: self._set(self._since_mark()),
            "GLOBAL": lambda arg: self._push(_Global(arg)),
            "STACK_GLOBAL": lambda _: self._push(_Global(" ".join(self._pop(2)))),
            "BINPERSID": lambda _: self._push(self._storage(*self._pop(1)[0])),
            "REDUCE": lambda _: self._call(*self._pop(2)),
            "BUILD": lambda _: self._build(*self._pop(1)),
        }

    def run(self, pickle: bytes) -> dict[Any, Any]:
        for opcode, arg, _ in pickletools.genops(pickle):
            step = self._steps.get(opcode.name)
            if step is None:
                raise InvalidInput(f"its pickle has the instruction {opcode.name}")
            step(arg)
        (content,) = self._stack
        if not isinstance(content, dict):
            raise InvalidInput(f"it is a {type(content).__name__}, a dictionary of tensors is expected")
        return content

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("its stack is empty")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _since_mark(self) -> list[Any]:
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _set(self, items: list[Any]) -> None:
        content, names = self._stack[-1], items[::2]
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in names):
            raise InvalidInput("it has a dictionary whose keys are not names")
        content.update(zip(names, items[1::2], strict=True))

    def _build(self, state: Any) -> None:
        """A dictionary of torch has a note of the versions of its modules, which nobody needs."""
        if not isinstance(self._stack[-1], dict) or not isinstance(state, dict) or state.keys() - {"_metadata"}:
            raise InvalidInput("it sets the state of an object")

    def _storage(self, kind: Any, storage: Any, key: Any, _location: Any, count: Any) -> _Storage:
        name = storage.name.removeprefix("torch ") if isinstance(storage, _Global) else ""
        if kind != "storage" or name not in _DTYPES or not isinstance(key, str) or type(count) is not int:
            raise InvalidInput(f"it refers to something that is not a storage of {', '.join(_DTYPES.values())}")
        begin, end = self._places[f"data/{key}"]
        dtype = _DTYPES[name]
        if count * ITEM_BYTES[dtype] > end - begin:
            raise ValueError(f"its storage {key} has {end - begin} bytes")
        return _Storage(dtype=dtype, begin=begin, end=end)

    def _call(self, function: Any, arguments: Any) -> None:
        name = function.name if isinstance(function, _Global) else "no function"
        if name == _DICT and arguments == ():
            self._push({})
        elif name == _TENSOR:
            self._push(_span(*arguments[:4]))
        elif name == _PARAMETER and isinstance(arguments[0], TensorSpan):
            self._push(arguments[0])
        else:
            raise InvalidInput(f"it calls {name.replace(' ', '.')[:100]}")


def _span(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> TensorSpan:
    """A tensor whose rows follow each other. ValueError unless it is within its storage."""
    if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor has a shape that is not one of whole numbers")
    contiguous = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(size != 1 and have != want for size, have, want in zip(shape, stride, contiguous, strict=True)):
        raise InvalidInput(f"a tensor of shape {list(shape)} is not contiguous")
    item = ITEM_BYTES[storage.dtype]
    begin = storage.begin + offset * item
    end = begin + math.prod(shape) * item
    if end > storage.end:
        raise ValueError(f"a tensor of shape {list(shape)} is larger than its storage")
    return TensorSpan(name="", dtype=storage.dtype, shape=shape, begin=begin, end=end)

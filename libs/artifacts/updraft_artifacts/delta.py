"""Lossless deltas between two weights files, a third of the size of a version or less.

Training changes most weights by a little and some not at all. Words of 8, 16 or 32 bits are mapped to integers in the order
of the values they represent. The difference of two such integers (modulo 2^n, with the sign folded in) is small, and zstd
compresses its bytes well, plane by plane. Within a block the words are sorted by their exponent in the base, which predicts
the size of the difference and is known to the reader too. A delta is a list of independent blocks: a few threads encode or
decode them, and only a few are in memory. Rejected: xor, and tools that search for equal stretches (docs/adr/0011).

    header  magic, size of the base and of the result, sha256 of both
    block   word width, size in the result, offset in the base, payload size; then the payload.
            Width 0 means that no base is used; an empty payload means that nothing changed.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import zstandard

from updraft_artifacts import safetensors_header
from updraft_artifacts.digests import digest_of
from updraft_artifacts.in_order import map_in_order, num_cores
from updraft_chassis.errors import Corrupt, InvalidInput

BLOCK_BYTES = 1024 * 1024
"""Larger blocks save less than 1 %, because zstd builds new tables every 128 KiB anyway."""

MAX_WORKERS = 4
"""Threads of one delta, if the process has so many cores. numpy, zstd and hashlib release the interpreter's lock."""

_LEVEL = 1
"""The data holds almost no repeats: level 9 takes twice the time and saves half a percent."""

_MAGIC = b"UPDELTA1"
_HEADER = struct.Struct("<8sQQ32s32s")
_BLOCK = struct.Struct("<BxxxIQI")

# zstd's bound for incompressible data (ZSTD_compressBound).
_MAX_PAYLOAD_BYTES = BLOCK_BYTES + BLOCK_BYTES // 256

_SIGNED: dict[int, np.dtype[np.signedinteger[Any]]] = {1: np.dtype("<i1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}

Words = npt.NDArray[np.unsignedinteger[Any]]

_WORDS: dict[int, np.dtype[np.unsignedinteger[Any]]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Base and result of a delta. Digests are "sha256:<hex>" of whole files."""

    base_bytes: int
    result_bytes: int
    base_digest: str
    result_digest: str

    @classmethod
    def read(cls, delta: BinaryIO) -> Self:
        """Read the header at the start of a delta; Corrupt if it has another format."""
        magic, base_bytes, result_bytes, base, result = _unpack(_HEADER, delta)
        if magic != _MAGIC:
            raise Corrupt(f"the delta starts with {magic!r}, expected {_MAGIC.decode()}")
        return cls(
            base_bytes=base_bytes,
            result_bytes=result_bytes,
            base_digest=f"sha256:{base.hex()}",
            result_digest=f"sha256:{result.hex()}",
        )

    def write(self, delta: BinaryIO) -> None:
        digests = (bytes.fromhex(digest.removeprefix("sha256:")) for digest in (self.base_digest, self.result_digest))
        delta.write(_HEADER.pack(_MAGIC, self.base_bytes, self.result_bytes, *digests))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A stretch of the result in words of `width` bytes, and its offset in the base (None if it is not in the base)."""

    width: int
    begin: int
    end: int
    base_begin: int | None


class _Block(NamedTuple):
    """A block of the result, or its payload, with the bytes of the base at `base_begin`."""

    width: int
    length: int
    base_begin: int
    data: bytes
    before: bytes


def encode(base: BinaryIO, result: BinaryIO, delta: BinaryIO) -> Header:
    """Write to `delta` the difference from `base` to `result`. It works on any files, but only safetensors become small."""
    base_bytes, result_bytes = base.seek(0, 2), result.seek(0, 2)
    base_digest, result_digest = map_in_order(_digest, (base, result), num_workers=2)
    header = Header(
        base_bytes=base_bytes, result_bytes=result_bytes, base_digest=base_digest, result_digest=result_digest
    )
    header.write(delta)
    blocks = (block for run in _runs(base, result, header) for block in _read_run(run, base, result, base_bytes))
    for block in map_in_order(_encode_block, blocks, num_workers=_num_workers()):
        delta.write(_BLOCK.pack(block.width, block.length, block.base_begin, len(block.data)))
        delta.write(block.data)
    return header


def decode(delta: BinaryIO, base: BinaryIO, result: BinaryIO, expected: Header) -> None:
    """Write to `result` the file that was given to `encode`; Corrupt if the delta is not `expected`, incomplete or damaged.

    It holds a few blocks per thread in memory and writes at most `expected.result_bytes`, whatever the delta contains.
    """
    if (header := Header.read(delta)) != expected:
        raise Corrupt(f"the delta is {header}, expected {expected}")
    digest = hashlib.sha256()
    blocks = _read_blocks(delta, base, expected.result_bytes)
    for data in map_in_order(_decode_block, blocks, num_workers=_num_workers()):
        digest.update(data)
        result.write(data)
    if delta.read(1):
        raise Corrupt("the delta has data after its last block")
    if f"sha256:{digest.hexdigest()}" != expected.result_digest:
        raise Corrupt(f"the delta produces sha256:{digest.hexdigest()}, expected {expected.result_digest}")


def _num_workers() -> int:
    return min(MAX_WORKERS, num_cores())


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    return digest_of(file)


def _runs(old: BinaryIO, new: BinaryIO, header: Header) -> Iterator[_Run]:
    """Tensor by tensor if both files are safetensors, otherwise the whole file, compared byte by byte."""
    try:
        old_spans = {
            (span.name, span.dtype, span.end - span.begin): span.begin for span in safetensors_header.read(old)
        }
        spans = safetensors_header.read(new)
    except InvalidInput:
        old_spans, spans = {}, []
    start = spans[0].begin if spans else header.result_bytes
    yield _Run(width=0, begin=0, end=start, base_begin=0)
    for span in spans:
        base_begin = old_spans.get((span.name, span.dtype, span.end - span.begin))
        width = min(safetensors_header.ITEM_BYTES[span.dtype], 4) if base_begin is not None else 0
        yield _Run(width=width, begin=span.begin, end=span.end, base_begin=base_begin)


def _read_run(run: _Run, old: BinaryIO, new: BinaryIO, base_bytes: int) -> Iterator[_Block]:
    for begin in range(run.begin, run.end, BLOCK_BYTES):
        new.seek(begin)
        data, before, base_begin = new.read(min(run.end - begin, BLOCK_BYTES)), b"", 0
        if run.base_begin is not None:
            base_begin = run.base_begin + begin - run.begin
            old.seek(min(base_begin, base_bytes))
            before = old.read(len(data))
        yield _Block(run.width, len(data), base_begin, data, before)


def _encode_block(block: _Block) -> _Block:
    """The same block with its payload."""
    if block.data == block.before:
        return block._replace(width=block.width or 1, data=b"", before=b"")
    words = _differences(block.data, block.before, block.width) if block.width else block.data
    return block._replace(data=zstandard.ZstdCompressor(level=_LEVEL).compress(words), before=b"")


def _read_blocks(delta: BinaryIO, base: BinaryIO, missing: int) -> Iterator[_Block]:
    """The blocks with their payloads, checked as far as that takes no memory."""
    while missing:
        width, length, base_begin, payload_bytes = _unpack(_BLOCK, delta)
        has_words = length % width == 0 if width in _WORDS else width == 0 < payload_bytes
        if not has_words or not 0 < length <= min(missing, BLOCK_BYTES) or payload_bytes > _MAX_PAYLOAD_BYTES:
            raise Corrupt(
                f"the delta has a block of {length} bytes in words of {width} with a payload of {payload_bytes},"
                f" where {missing} bytes are missing"
            )
        payload, before = _read(delta, payload_bytes), b""
        if width:
            base.seek(min(base_begin, 2**62))
            before = _read(base, length)
        yield _Block(width, length, base_begin, payload, before)
        missing -= length


def _decode_block(block: _Block) -> bytes:
    if not block.data:
        return block.before
    data = _decompress(block.data, block.length)
    return _restored(data, block.before, block.width) if block.width else data


def _decompress(payload: bytes, length: int) -> bytes:
    try:
        # Check first, because zstandard allocates the size that the frame declares.
        declared = zstandard.frame_content_size(payload)
        if declared != length:
            raise Corrupt(f"a block of {length} bytes declares {declared} compressed bytes")
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"a block of the delta cannot be decompressed: {error}") from None


def _differences(block: bytes, before: bytes, width: int) -> bytes:
    new, old = np.frombuffer(block, _WORDS[width]), np.frombuffer(before, _WORDS[width])
    words = _folded(_ordered(new) - _ordered(old))[_by_exponent(old)]
    return _planes(words).tobytes()


def _restored(planes: bytes, before: bytes, width: int) -> bytes:
    old = np.frombuffer(before, _WORDS[width])
    words: Words = np.empty_like(old)
    words[_by_exponent(old)] = _from_planes(planes, old.dtype)
    return _unordered(_unfolded(words) + _ordered(old)).tobytes()


def _ordered(words: Words) -> Words:
    """Map floating-point words (sign and magnitude) to integers in the order of their values."""
    mask: Words = np.bitwise_or(_spread_sign(words), _sign(words))  # all bits of a negative word, else the sign
    return np.bitwise_xor(words, mask)


def _unordered(words: Words) -> Words:
    mask: Words = np.bitwise_or(~_spread_sign(words), _sign(words))
    return np.bitwise_xor(words, mask)


def _folded(differences: Words) -> Words:
    """Zigzag: map 0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    twice: Words = np.left_shift(differences, 1)
    return np.bitwise_xor(twice, _spread_sign(differences))


def _unfolded(words: Words) -> Words:
    half: Words = np.right_shift(words, 1)
    return np.bitwise_xor(half, np.negative(np.bitwise_and(words, 1)))


def _spread_sign(words: Words) -> Words:
    """All bits set where the highest one is, else none. Much faster than numpy.where."""
    width = words.itemsize
    spread: Words = np.right_shift(words.view(_SIGNED[width]), 8 * width - 1).view(words.dtype)
    return spread


def _by_exponent(words: Words) -> npt.NDArray[np.intp]:
    """Sort order by the 8 bits below the sign: the exponent of bf16 and fp32, and 3 mantissa bits more for fp16."""
    magnitude = words & (_sign(words) - 1)
    return np.argsort((magnitude >> max(8 * words.itemsize - 9, 0)).astype(np.uint8), kind="stable")


def _sign(words: Words) -> int:
    return int(1 << (8 * words.itemsize - 1))


def _planes(words: Words) -> npt.NDArray[np.uint8]:
    """Bytes as [width, words], the most significant plane first."""
    return words.view(np.uint8).reshape(-1, words.itemsize)[:, ::-1].T


def _from_planes(planes: bytes, dtype: np.dtype[np.unsignedinteger[Any]]) -> Words:
    rows = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, -1)
    words: Words = rows[0].astype(dtype)
    for row in rows[1:]:
        words = (words << 8) | row
    return words


def _unpack(record: struct.Struct, file: BinaryIO) -> tuple[Any, ...]:
    return record.unpack(_read(file, record.size))


def _read(file: BinaryIO, num_bytes: int) -> bytes:
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise Corrupt(f"expected {num_bytes} more bytes, the file has {len(data)}")
    return data

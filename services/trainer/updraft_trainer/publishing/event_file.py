"""TensorBoard's event files, as far as scalars need them: records of TFRecord framing that hold an Event message.

A few functions instead of a package: tensorboard brings a web server, and the writers of torch and tensorboardX have threads
and queues of their own, between which an error of the disk is late or lost.
"""

import math
import struct
from collections.abc import Mapping

_START = 1
"""SessionLog.SessionStatus.START."""

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_MAX_FLOAT = 3.4028234663852886e38


def head(unix_s: float, *, first_step: int | None = None) -> bytes:
    """The beginning of a file. With `first_step`, a run goes on there: TensorBoard drops later points of earlier files."""
    version = _record(_event(unix_s, 0) + _bytes(3, b"brain.Event:2"))
    if first_step is None:
        return version
    return version + _record(_event(unix_s, first_step) + _bytes(7, _key(1, 0) + _varint(_START)))


def row(unix_s: float, step: int, values: Mapping[str, float]) -> bytes:
    """Scalars of a step, by tag."""
    summary = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in values.items())
    return _record(_event(unix_s, step) + _bytes(5, summary))


def crc32c(data: bytes) -> int:
    """The CRC with Castagnoli's polynomial (RFC 3720, B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)


def _event(unix_s: float, step: int) -> bytes:
    return _key(1, 1) + struct.pack("<d", unix_s) + _key(2, 0) + _varint(step)


def _bytes(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content


def _float(field: int, value: float) -> bytes:
    is_too_large = math.isfinite(value) and abs(value) > _MAX_FLOAT
    return _key(field, 5) + struct.pack("<f", math.copysign(math.inf, value) if is_too_large else value)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(number: int) -> bytes:
    """Protobuf's integers: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE = tuple(map(_entry, range(256)))

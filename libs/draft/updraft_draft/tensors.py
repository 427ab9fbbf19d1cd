"""Trace tensors on the wire: bfloat16, float8 with one scale per row, or float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from updraft.trace.v1 import trace_pb2
from updraft_chassis.errors import InvalidInput
from updraft_draft.trace_bytes import Data

Encoding = trace_pb2.TensorEncoding

_DTYPES = {
    trace_pb2.TENSOR_ENCODING_BF16: torch.bfloat16,
    trace_pb2.TENSOR_ENCODING_FP8_E4M3: torch.float8_e4m3fn,
    trace_pb2.TENSOR_ENCODING_FP32: torch.float32,
}
_FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""

_HALF_SCALE = 2.0**8
"""Between a float8_e4m3fn and the float16 with the same bits for exponent and mantissa."""

_ROWS_IN_CACHE = 32
SCALE_BYTES = 4
"""The scale of a packed row is its end."""


def encode(rows: Tensor, encoding: trace_pb2.TensorEncoding.ValueType) -> trace_pb2.Tensor:
    """Encode a float tensor [rows, columns]. float8 has an error of up to about 6 % of each value (3 mantissa bits). What is
    `packed` stays float8, whatever the encoding."""
    if rows.dtype == torch.uint8:
        return _unpacked(rows)
    message = trace_pb2.Tensor(encoding=encoding, rows=rows.shape[0], columns=rows.shape[1])
    if encoding == trace_pb2.TENSOR_ENCODING_FP8_E4M3:
        rows, scales = _to_float8(rows)
        message.row_scales = _bytes(scales)
    message.data = _bytes(rows.to(_DTYPES[encoding]))
    return message


def packed(rows: Tensor) -> Tensor:
    """A float tensor [rows, columns] as float8, each row with its scale behind it: uint8 [rows, columns + 4]. Takes half the
    memory of bfloat16."""
    values, scales = _to_float8(rows)
    return torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], -1)


def _unpacked(rows: Tensor) -> trace_pb2.Tensor:
    values, scales = rows[:, :-SCALE_BYTES], rows[:, -SCALE_BYTES:]
    return trace_pb2.Tensor(
        encoding=trace_pb2.TENSOR_ENCODING_FP8_E4M3,
        rows=values.shape[0],
        columns=values.shape[1],
        row_scales=_bytes(scales),
        data=_bytes(values),
    )


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRows:
    """A tensor [rows, columns] as it was sent. float8 takes half the bytes of the decoded values, so rows are decoded when they
    are used. A slice shares the bytes."""

    _bytes: npt.NDArray[np.uint8]
    """[rows, bytes of a row]."""
    _dtype: torch.dtype
    _scales: Tensor
    """float32 [rows, 1] for float8, else [rows, 0]."""

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """The bytes of a tensor [rows, columns] of bfloat16 or float32."""
        encoded = rows.contiguous().view(torch.uint8).numpy()
        return cls(encoded, rows.dtype, torch.empty(len(rows), 0))

    @classmethod
    def read(cls, message: trace_pb2.Tensor, data: Data | None = None) -> Self:
        """Shares the bytes of `data`, by default those of the message. InvalidInput if the sizes do not match."""
        data = message.data if data is None else data
        dtype = _checked_dtype(message, len(data))
        encoded = np.frombuffer(data, np.uint8).reshape(message.rows, message.columns * dtype.itemsize)
        has_scales = dtype == torch.float8_e4m3fn
        scales = _tensor(message.row_scales, torch.float32)[:, None] if has_scales else torch.empty(message.rows, 0)
        return cls(encoded, dtype, scales)

    def __len__(self) -> int:
        return len(self._bytes)

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(self._bytes[rows], self._dtype, self._scales[rows])

    @property
    def num_columns(self) -> int:
        num_bytes: int = self._bytes.shape[1]
        return num_bytes // self._dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self._bytes.nbytes + self._scales.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of decoded rows."""
        return torch.float32 if self._dtype == torch.float32 else torch.bfloat16

    def decoded(self) -> Tensor:
        """bfloat16 [rows, columns] from bf16 and fp8, float32 from fp32."""
        return decoded([self])

    def decode_into(self, result: Tensor) -> None:
        """Write the values to `result` [rows, columns]."""
        if self._dtype == torch.float8_e4m3fn:
            _decode_float8(self._bytes, self._scales, result)
        elif result.numel():
            result.copy_(torch.from_numpy(self._bytes.copy()).view(self._dtype))

    def is_finite(self) -> bool:
        """Whether all decoded values are finite. float8 is checked without decoding: no value may be NaN, and the largest
        float8 times each scale must be finite."""
        if self._dtype != torch.float8_e4m3fn:
            return is_finite(self.decoded())
        parts = (self._bytes[first : first + _ROWS_IN_CACHE] for first in range(0, len(self), _ROWS_IN_CACHE))
        is_number = all(not part.size or int((part & 0x7F).max()) < 0x7F for part in parts)
        return is_number and is_finite((self._scales * _FP8_MAX).bfloat16())


def decoded(parts: Sequence[EncodedRows]) -> Tensor:
    """The rows of all parts, which have the same width: bfloat16, or float32 if one of them is."""
    dtype = torch.float32 if any(part.dtype == torch.float32 for part in parts) else torch.bfloat16
    result = torch.empty(sum(map(len, parts)), parts[0].num_columns, dtype=dtype)
    first = 0
    for part in parts:
        part.decode_into(result[first : first + len(part)])
        first += len(part)
    return result


def decode(message: trace_pb2.Tensor) -> Tensor:
    """The tensor [rows, columns]; see `EncodedRows`. InvalidInput if the sizes do not match."""
    return EncodedRows.read(message).decoded()


def _checked_dtype(message: trace_pb2.Tensor, num_bytes: int) -> torch.dtype:
    """The type of its data of so many bytes. InvalidInput if it is unknown or the sizes do not match."""
    dtype = _DTYPES.get(message.encoding)
    if dtype is None:
        raise InvalidInput(f"tensor encoding {message.encoding} is unknown to this version")
    expected = message.rows * message.columns * dtype.itemsize
    if num_bytes != expected:
        raise InvalidInput(f"tensor of {message.rows} x {message.columns} has {num_bytes} bytes, not {expected}")
    if dtype == torch.float8_e4m3fn and len(message.row_scales) != 4 * message.rows:
        raise InvalidInput(f"tensor of {message.rows} rows has {len(message.row_scales) // 4} scales")
    return dtype


def is_finite(values: Tensor) -> bool:
    """Without NaN and infinity. `torch.isfinite` takes thirty times as long."""
    return not values.numel() or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values))


def _to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [rows, columns] and scales [rows, 1], a few rows at a time: see `_decode_float8`."""
    result, scales = torch.empty(rows.shape, dtype=torch.float8_e4m3fn), torch.empty(len(rows), 1)
    for first in range(0, len(rows) if rows.numel() else 0, _ROWS_IN_CACHE):
        some = slice(first, first + _ROWS_IN_CACHE)
        values = rows[some].float()
        scales[some] = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True)).clamp_(min=1e-12)
        scales[some] /= _FP8_MAX
        result[some] = values / scales[some]
    return result, scales


def _decode_float8(values: npt.NDArray[np.uint8], scales: Tensor, result: Tensor) -> None:
    """Write the bits of float8_e4m3fn [rows, columns] times scales [rows, 1] to `result`. A few rows at a time stay in the
    processor's cache."""
    for first in range(0, len(values) if values.size else 0, _ROWS_IN_CACHE):
        rows = slice(first, first + _ROWS_IN_CACHE)
        bits = torch.from_numpy(values[rows].copy())
        if int((bits & 0x7F).amax()) == 0x7F:  # NaN
            result[rows] = bits.view(torch.float8_e4m3fn).float().mul_(scales[rows])
        else:
            result[rows] = _float8_values(bits).mul_(scales[rows] * _HALF_SCALE)


def _float8_values(bits: Tensor) -> Tensor:
    """float32 of the bits of float8_e4m3fn, uint8, without NaN, divided by `_HALF_SCALE`.

    torch converts one value at a time. Here a float8's bits become those of a float16, whose exponents begin eight lower, which
    is eight times as fast, and exact.
    """
    extended = bits.view(torch.int8).to(torch.int16)  # the sign is in the upper nine bits
    return extended.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(data: Data, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype)

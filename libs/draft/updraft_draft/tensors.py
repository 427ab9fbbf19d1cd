"""Trace tensors on the wire: bfloat16, float8 with one scale per row, or float32."""

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


def encode(rows: Tensor, encoding: trace_pb2.TensorEncoding.ValueType) -> trace_pb2.Tensor:
    """Encode a float tensor [rows, columns]. float8 has an error of up to about 6 % of each value (3 mantissa bits)."""
    message = trace_pb2.Tensor(encoding=encoding, rows=rows.shape[0], columns=rows.shape[1])
    if encoding == trace_pb2.TENSOR_ENCODING_FP8_E4M3:
        rows, scales = _to_float8(rows)
        message.row_scales = _bytes(scales)
    message.data = _bytes(rows.to(_DTYPES[encoding]))
    return message


def decode(message: trace_pb2.Tensor, data: Data | None = None) -> Tensor:
    """The tensor [rows, columns]: bfloat16 from bf16 and fp8, float32 from fp32. InvalidInput if the sizes do not match.

    `data`: the message's, if it is elsewhere. Each access to that of a message copies it.
    """
    data = message.data if data is None else data
    dtype = _checked_dtype(message, len(data))
    if dtype != torch.float8_e4m3fn:
        return _tensor(data, dtype).view(message.rows, message.columns)
    values = np.frombuffer(data, np.uint8).reshape(message.rows, message.columns)
    return _from_float8(values, _tensor(message.row_scales, torch.float32)[:, None])


def outline(message: trace_pb2.Tensor, data: Data | None = None) -> Tensor:
    """Like `decode`, but the tensor has no values: it is on the device meta."""
    dtype = _checked_dtype(message, len(message.data if data is None else data))
    decoded = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return torch.empty(message.rows, message.columns, dtype=decoded, device="meta")


def is_finite_encoded(message: trace_pb2.Tensor, rows: slice, data: Data | None = None) -> bool:
    """Whether `decode` gives finite values in these rows, at a tenth of its cost: with each scale the largest float8 is too.
    `message` has the right sizes."""
    values = np.frombuffer(message.data if data is None else data, np.uint8).reshape(message.rows, -1)[rows]
    if message.encoding != trace_pb2.TENSOR_ENCODING_FP8_E4M3:
        return is_finite(_tensor(values.tobytes(), _DTYPES[message.encoding]))
    scales = _tensor(message.row_scales, torch.float32)[rows]
    return not values.size or (int((values & 0x7F).max()) < 0x7F and is_finite((scales * _FP8_MAX).bfloat16()))


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
    """float8_e4m3fn [rows, columns] and scales [rows, 1], a few rows at a time: see `_from_float8`."""
    result, scales = torch.empty(rows.shape, dtype=torch.float8_e4m3fn), torch.empty(len(rows), 1)
    for first in range(0, len(rows) if rows.numel() else 0, _ROWS_IN_CACHE):
        some = slice(first, first + _ROWS_IN_CACHE)
        values = rows[some].float()
        scales[some] = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True)).clamp_(min=1e-12)
        scales[some] /= _FP8_MAX
        result[some] = values / scales[some]
    return result, scales


def _from_float8(values: npt.NDArray[np.uint8], scales: Tensor) -> Tensor:
    """bfloat16 of the bits of float8_e4m3fn [rows, columns] times scales [rows, 1]. A few rows at a time stay in the
    processor's cache."""
    result = torch.empty(values.shape, dtype=torch.bfloat16)
    for first in range(0, len(values) if values.size else 0, _ROWS_IN_CACHE):
        rows = slice(first, first + _ROWS_IN_CACHE)
        bits = torch.from_numpy(values[rows].copy())
        if int((bits & 0x7F).amax()) == 0x7F:  # NaN
            result[rows] = bits.view(torch.float8_e4m3fn).float().mul_(scales[rows])
        else:
            result[rows] = _float8_values(bits).mul_(scales[rows] * _HALF_SCALE)
    return result


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

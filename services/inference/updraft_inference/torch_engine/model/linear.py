"""A linear map of target or draft, with its weight in the layout that the machine reads fastest.

A decode step reads every weight once for a handful of rows, so it takes as long as that reading. In bfloat16 on a CPU, torch's
plain operation reorders the weight for oneDNN in every call; here that happens once. With AMX the product is the C++ kernel's
(`matmul_amx.cpp`), which reads at the speed of the memory. Without AVX-512, torch has no fast product, so `matmul_avx2.cpp`
computes it. A draft's weight may also be rounded to 8 bits (`int8.h`).
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from updraft_draft.precision import multiplies_bfloat16
from updraft_kernels.loader import Int8Weight, Kernels

SIDE, DEPTH = 16, 32
"""Outputs and inputs of a tile of weights."""
GROUP, QUAD = 64, 4
"""Inputs that share a scale in int8, and inputs that are multiplied together."""
OUTPUTS_TOGETHER = 256
"""Outputs that are rounded at a time; a multiple of `SIDE`."""


class Linear:
    """y [R, out] = x [R, in] W^T + b, by torch."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    @property
    def weight(self) -> Tensor:
        """[out, in], whatever the layout in memory."""
        return self._weight

    def holds(self, weight: Tensor) -> bool:
        """Whether it was made of this weight."""
        return torch.equal(self.weight, weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class OneDnnLinear(Linear):
    """By oneDNN, with a weight in oneDNN's layout. The operators are those that torch's own compiler emits."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight), bias)  # noqa: SLF001

    @property
    def weight(self) -> Tensor:
        return self._weight.to_dense()

    def __call__(self, x: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")  # noqa: SLF001
        return packed


class AmxLinear(Linear):
    """By the C++ kernel, with a weight in tiles [out / 16, in / 32, 16 pairs, 16 outputs, 2]. The result of a row does not
    depend on the rows next to it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Kernels) -> None:
        assert library.has_amx
        self._shape = weight.shape
        out, of = weight.shape
        tiles = weight.view(out // SIDE, SIDE, of // DEPTH, DEPTH // 2, 2).permute(0, 2, 3, 1, 4).contiguous()
        super().__init__(tiles, None if bias is None else bias.float())
        self._multiply = library.matmul_amx

    @property
    def weight(self) -> Tensor:
        return self._weight.permute(0, 3, 1, 2, 4).reshape(self._shape)

    def __call__(self, x: Tensor) -> Tensor:
        x, (out, of) = x.contiguous(), self._shape
        assert x.dtype == self._weight.dtype
        assert x.shape[1:] == (of,)
        y = x.new_empty(len(x), out)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._multiply(x.data_ptr(), self._weight.data_ptr(), bias, y.data_ptr(), len(x), out, of)
        return y


class WideningLinear(Linear):
    """By the C++ kernel, in float32, with a weight in blocks [out / 16, in, 8, 2] of outputs i and i + 8 that it widens. The
    result of a row does not depend on the rows next to it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Kernels) -> None:
        assert library.has_widening
        self._shape = weight.shape
        out, of = weight.shape
        blocks = weight.view(out // SIDE, 2, SIDE // 2, of).permute(0, 3, 2, 1).contiguous()
        super().__init__(blocks, None if bias is None else bias.float())
        self._multiply = library.matmul_avx2

    @property
    def weight(self) -> Tensor:
        return self._weight.permute(0, 3, 2, 1).reshape(self._shape)

    def __call__(self, x: Tensor) -> Tensor:
        out, of = self._shape
        assert x.dtype == self._weight.dtype
        assert x.shape[1:] == (of,)
        wide, y = x.float().contiguous(), x.new_empty(len(x), out)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._multiply(wide.data_ptr(), self._weight.data_ptr(), bias, y.data_ptr(), len(x), out, of)
        return y


class Int8Linear(Linear):
    """By the C++ kernel, with weights and inputs rounded to 8 bits, which suits a draft: its rounding changes no output. The
    result of a row does not depend on the rows next to it. For states in bfloat16."""

    def __init__(self, weight: Tensor, library: Kernels) -> None:
        super().__init__(weight.new_empty(0))
        self._blocks, self._scales = _quantized(weight)
        self.packed = Int8Weight(self._blocks.data_ptr(), self._scales.data_ptr(), *weight.shape)
        self._multiply = library.matmul_int8

    @property
    def weight(self) -> Tensor:
        """The rounded weight, float32."""
        rows = self._blocks.permute(0, 2, 1, 3).reshape(len(self._blocks) * SIDE, -1).float() - 128
        return rows[: self.packed.num_outputs, : self.packed.num_inputs] * self._scales[:, None]

    def holds(self, weight: Tensor) -> bool:
        return all(map(torch.equal, _quantized(weight), (self._blocks, self._scales)))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        assert x.dtype == torch.bfloat16
        assert x.shape[1:] == (self.packed.num_inputs,)
        y = x.new_empty(len(x), self.packed.num_outputs)
        if not self._multiply(ctypes.byref(self.packed), x.data_ptr(), y.data_ptr(), len(x)):
            raise RuntimeError("no memory for a product")  # the type that torch raises
        return y


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as `int8.h` reads them: uint8 [out / 16, in / 4, 16, 4], 0 being 128, and the scale of each output, float32.

    Some outputs at a time: a swap converts a whole draft beside running requests, which need the cache and the memory.
    """
    blocks, scales = zip(*map(_quantized_part, torch.split(weight, OUTPUTS_TOGETHER)), strict=True)
    return torch.cat(blocks), torch.cat(scales)


def _quantized_part(weight: Tensor) -> tuple[Tensor, Tensor]:
    out, of = weight.shape
    values = weight.float()
    scales = values.abs().amax(1) / 127
    values /= scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    values = values.round_().nan_to_num_(0.0).add_(128)
    rows = F.pad(values.to(torch.uint8), (0, -of % GROUP, 0, -out % SIDE), value=128)
    num_quads = rows.shape[1] // QUAD
    quads = rows.view(torch.int32).view(-1, SIDE, num_quads)  # moved as one number
    return quads.transpose(1, 2).contiguous().view(torch.uint8).view(-1, num_quads, SIDE, QUAD), scales


def linear(
    weight: Tensor, bias: Tensor | None = None, *, library: Kernels | None = None, may_round: bool = False
) -> Linear:
    """The fastest implementation for this weight on this machine; `may_round`: to 8 bits, if there is no bias."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return Linear(weight, bias)
    if may_round and bias is None and library is not None and library.has_int8:
        return Int8Linear(weight, library)
    out, of = weight.shape
    if library is not None and out % SIDE == 0 and of % DEPTH == 0 and library.has_amx:
        return AmxLinear(weight, bias, library)
    if multiplies_bfloat16(weight.device):
        return OneDnnLinear(weight, bias)
    if library is not None and out % SIDE == 0 and library.has_widening:
        return WideningLinear(weight, bias, library)
    return Linear(weight, bias)

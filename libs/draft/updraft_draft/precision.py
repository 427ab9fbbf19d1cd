"""In which numbers a device multiplies matrices fast: bfloat16, or float32 on a CPU without instructions for bfloat16.

On a CPU with AVX2 alone, torch's product of many rows in bfloat16 takes 5 to 8 times as long as in float32
(`python -m bench.serving.products`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS_TOGETHER = 4096
"""Rows of a weight that are widened to float32 at a time: 67 MB at D 4,096."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are at least as fast as in float32."""
    if device.type != "cpu":
        return True
    has_kernels = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(has_kernels and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - no public name


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 or float32, whichever the device multiplies faster."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Products in `product_dtype`, of tensors in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, D] weight [N, D]^T as [R, N], in the weight's dtype, or in float32 where that is faster."""
    if weight.dtype != torch.bfloat16 or multiplies_bfloat16(weight.device):
        return F.linear(x.to(weight.dtype), weight)
    wide = x.float()
    return torch.cat([F.linear(wide, part.float()) for part in torch.split(weight, WEIGHTS_TOGETHER)], -1)

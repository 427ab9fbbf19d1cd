"""A linear map of target or draft, its weight kept as the machine's kernels read it.

A decode step reads every weight once for a handful of rows, so it lasts as long as that reading. In bfloat16 on a CPU the
plain operation brings the weight into oneDNN's blocked order anew for each call. Here that is done once. The operators are
those that torch's own compiler emits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y [R, out] = x [R, in] W^T + b. `weight` [out, in] is not kept where a packed copy takes its place."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._is_packed = is_packable(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight  # noqa: SLF001

    @property
    def weight(self) -> Tensor:
        """[out, in], read back from the packed copy where there is one."""
        return self._weight.to_dense() if self._is_packed else self._weight

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it."""
        if not self._is_packed:
            return F.linear(x, self._weight, self._bias)
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")  # noqa: SLF001
        return packed


def is_packable(weight: Tensor) -> bool:
    """bfloat16 on a CPU that computes with it."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    has_kernels = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(has_kernels and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001

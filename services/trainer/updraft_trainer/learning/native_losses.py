"""The default loss by a C++ kernel, on a CPU: a row of logits stays in the cache of a core while it is computed.

Torch's operations read and write tensors of logits a dozen times, and took a fifth of a training step (ADR 0081). The kernels
are operators of torch, so that torch knows the shapes of their results where it computes no values.
"""

from functools import cache

import torch
from torch import Tensor

from updraft_kernels.loader import Kernels, load_kernels

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class NativeLosses:
    """As `Predictions.of` and `forward_kl` of `losses`, for logits [rows, V] in float32 or bfloat16."""

    def __init__(self, library: Kernels) -> None:
        self._library = library

    def predictions(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """p [rows, V], and the sums of p log p [rows]; float32."""
        function = getattr(self._library, f"predictions_{_DTYPES[logits.dtype]}")
        logits = logits.contiguous()
        p, negentropy = torch.empty(logits.shape, dtype=torch.float32), torch.empty(len(logits), dtype=torch.float32)
        function(logits.data_ptr(), p.data_ptr(), negentropy.data_ptr(), *logits.shape)
        return p, negentropy

    def forward_kl(self, logits: Tensor, p: Tensor, negentropy: Tensor) -> tuple[Tensor, Tensor]:
        """Losses float32 [rows], and gradients [rows, V] in the dtype of the logits."""
        function = getattr(self._library, f"forward_kl_{_DTYPES[logits.dtype]}")
        assert p.shape == logits.shape
        assert p.dtype == negentropy.dtype == torch.float32
        logits, p, negentropy = logits.contiguous(), p.contiguous(), negentropy.contiguous()
        losses, gradients = torch.empty_like(negentropy), torch.empty_like(logits)
        pointers = (one.data_ptr() for one in (logits, p, negentropy, losses, gradients))
        function(*pointers, *logits.shape)
        return losses, gradients


def is_native(logits: Tensor) -> bool:
    """Whether a kernel computes the default loss of such logits. torch.compile makes one of its own."""
    if torch.compiler.is_compiling():
        return False
    return logits.device.type == "cpu" and logits.dtype in _DTYPES and _loaded() is not None


@torch.library.custom_op("updraft::predictions", mutates_args=())
def predictions(logits: Tensor) -> tuple[Tensor, Tensor]:
    return _native().predictions(logits)


@predictions.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape, dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("updraft::forward_kl", mutates_args=())
def forward_kl(logits: Tensor, p: Tensor, negentropy: Tensor) -> tuple[Tensor, Tensor]:
    return _native().forward_kl(logits, p, negentropy)


@forward_kl.register_fake
def _(logits: Tensor, p: Tensor, negentropy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(negentropy), logits.new_empty(logits.shape)


def _native() -> NativeLosses:
    native = _loaded()
    assert native is not None
    return native


@cache
def _loaded() -> NativeLosses | None:
    library = load_kernels()
    return None if library is None else NativeLosses(library)

"""The EAGLE-3 draft that vLLM serves: where each of its weights is, how it is replaced in place, and how it is read back.

On a GPU a weight is a parameter, and is copied into where it is. On a CPU vLLM packs the weight of a linear layer for its
kernel and frees the parameter; the new weight is packed before the swap, which then exchanges the packed one, and it is read
back by the product of the layer's own kernel with the identity, some columns at a time.

Of several tensor-parallel ranks each holds a part of most weights, in the layout that vLLM's own loaders write.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from updraft_tap.weights import EMBEDDING, RefusedError, watched
from updraft_vllm.parts import held_rows, part_of

_MAP = "draft_id_to_target_id"
"""vLLM's name for d2t, a parameter that each step reads."""
_PACKED = "cpu_linear"
"""vLLM's name for the packed weight of a layer on a CPU, a function."""

_PRODUCTS = 1 << 29
"""Multiplications in one piece of a product with the identity, half as many as a billion parameters need for a token."""
_LEAST_COLUMNS = 16
"""Fewer cost as much, because a kernel reads the whole weight for them."""

Write = Callable[[], None]


class VllmDraft:
    """The served draft, and the model that is its target. Raises RefusedError if it is none that can be swapped."""

    def __init__(self, model: Any, target: nn.Module, *, dtype: torch.dtype, is_compiled: bool) -> None:
        self.dtype = dtype
        self.config = model.config
        self._model, self._target = model, target
        self._layers = _layers(model)
        self.aux_size = int(model.model.fc_input_size)
        if getattr(model, _MAP, None) is None:
            raise RefusedError("the served draft has no vocabulary of its own, so none can be swapped in")
        if is_compiled and self.is_read_at_rest:
            raise RefusedError(
                "on a CPU vLLM compiles the weights of a draft in; start it with --enforce-eager to swap"
            )

    @property
    def is_read_at_rest(self) -> bool:
        """Packed weights are read by the kernels that the engine uses."""
        return any(hasattr(layer, _PACKED) for layer in self._layers.values())

    def part(self, prepared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights of a draft as far as this rank holds them; all of them if it is the only one."""
        if prepared.keys() != self._layers.keys():
            raise RefusedError(
                f"the served draft has the parameters {sorted(self._layers)}, but the checkpoint has {sorted(prepared)}"
            )
        parts = {name: part_of(name, layer, prepared[name]) for name, layer in self._layers.items()}
        return prepared if all(parts[name] is value for name, value in prepared.items()) else parts

    def prepare(self, prepared: Mapping[str, Tensor], d2t: Tensor) -> Sequence[Write]:
        """The writes that replace all weights; slow, and without effect until they run."""
        writes = [write for name, layer in self._layers.items() for write in _writes(name, layer, prepared[name])]
        return [*writes, _copy(getattr(self._model, _MAP), d2t)]

    def kept(self) -> Sequence[Write]:
        """The writes that restore all weights as they are now; on a GPU they hold a copy in pinned memory."""
        writes = [write for layer in self._layers.values() for write in _kept(layer)]
        return [*writes, _copy(getattr(self._model, _MAP), _copied(getattr(self._model, _MAP)))]

    def readers(self) -> Mapping[str, Sequence[Callable[[], Tensor]]]:
        """By weight, how to read what the kernels use, in pieces of the last dimension."""
        vocab = int(self.config.draft_vocab_size)
        found: dict[str, Sequence[Callable[[], Tensor]]] = {}
        for name, layer in self._layers.items():
            rows = held_rows(layer, vocab) if name == "lm_head.weight" else None
            found[name] = _pieces(layer, self.dtype, rows)
        found["d2t"] = [lambda: _copied(getattr(self._model, _MAP))]
        return found

    def target(self) -> Mapping[str, Tensor]:
        """The embedding, and some of the target's other weights that are not packed."""
        return watched(self._target, self._model)


def _layers(model: Any) -> dict[str, Any]:
    """The layers with a weight, by the name of the weight, without the embedding, which is the target's."""
    found = {}
    for name, layer in model.named_modules():
        weight = f"{name.removeprefix('model.')}.weight"
        if isinstance(layer.__dict__.get("_parameters", {}).get("weight"), nn.Parameter) and weight != EMBEDDING:
            found[weight] = layer
    return found


def _writes(name: str, layer: Any, value: Tensor) -> list[Write]:
    packed = _packed(layer, value) if hasattr(layer, _PACKED) else None
    writes: list[Write] = [] if packed is None else [lambda: setattr(layer, _PACKED, packed)]
    if layer.weight.numel():
        padded = _padded(value, layer.weight.shape)
        if padded.shape != layer.weight.shape:
            raise RefusedError(f"{name} has shape {tuple(value.shape)}, but vLLM holds {tuple(layer.weight.shape)}")
        writes.append(_copy(layer.weight, padded))
    return writes


def _packed(layer: Any, value: Tensor) -> Any:
    """As vLLM packs it, in a layer of our own."""
    scratch = nn.Module()
    shape = layer.weight.shape if layer.weight.numel() else value.shape
    scratch.weight = nn.Parameter(_padded(value, shape).clone(), requires_grad=False)
    layer.quant_method.process_weights_after_loading(scratch)
    return scratch.cpu_linear


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    """With rows of zeros after it, as vLLM pads a vocabulary."""
    if value.dim() != 2 or len(shape) != 2 or shape[0] <= len(value):
        return value
    return torch.cat([value, value.new_zeros(shape[0] - len(value), value.shape[1])])


def _copy(parameter: Tensor, value: Tensor) -> Write:
    """The new value waits in pinned memory if it goes to a GPU."""
    ready = value.to(parameter.dtype)
    if parameter.is_cuda:
        with torch.cuda.device(
            parameter.device
        ):  # a thread begins with the first one, where this rank has nothing to do
            ready = ready.pin_memory()

    def write() -> None:
        with torch.inference_mode():
            parameter.copy_(ready, non_blocking=True)

    return write


def _kept(layer: Any) -> list[Write]:
    writes: list[Write] = []
    if hasattr(layer, _PACKED):
        writes.append(partial(setattr, layer, _PACKED, getattr(layer, _PACKED)))
    if layer.weight.numel():
        writes.append(_copy(layer.weight, _copied(layer.weight)))
    return writes


def _copied(parameter: Tensor) -> Tensor:
    with torch.inference_mode():
        return parameter.detach().to("cpu", copy=True)


def _pieces(layer: Any, dtype: torch.dtype, rows: int | None) -> Sequence[Callable[[], Tensor]]:
    """How to read the first `rows` of the weight that the kernels use, or all of it."""
    if not hasattr(layer, _PACKED):
        return [lambda: _copied(layer.weight[:rows])]
    size = _input_size(layer)
    columns = max(_LEAST_COLUMNS, _PRODUCTS // (size * _output_size(layer)))
    return [
        partial(_columns, layer, dtype, rows, first, min(first + columns, size)) for first in range(0, size, columns)
    ]


def _columns(layer: Any, dtype: torch.dtype, rows: int | None, first: int, end: int) -> Tensor:
    """The columns from `first` up to `end` of a packed weight."""
    chosen = torch.zeros(end - first, _input_size(layer), dtype=dtype)
    chosen[:, first:end].fill_diagonal_(1)
    with torch.inference_mode():
        product: Tensor = layer.quant_method.apply(layer, chosen, None)
        return product.t()[:rows].contiguous()


def _input_size(layer: Any) -> int:
    size = getattr(layer, "input_size_per_partition", None) or getattr(layer, "input_size", None)
    return int(size or layer.embedding_dim)


def _output_size(layer: Any) -> int:
    return int(getattr(layer, "output_size_per_partition", None) or layer.output_size)

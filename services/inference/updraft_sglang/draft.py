"""The EAGLE-3 draft that SGLang serves: where its weights are, and how to replace them in place and read them back.

A weight is a parameter of the model, and the map from draft to target tokens (d2t) a buffer of it, after
`weights.share_vocabulary`. The embedding is the target's own parameter and is left alone; samples of it are compared.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from updraft_tap.weights import EMBEDDING, RefusedError, target_ids, watched

MAP = "hot_token_id"
"""SGLang's name for the map: the target's token of each draft token, int64 [V]."""
HEAD = "lm_head.weight"

ASLEEP = "SGLang has released its weights, so no draft can be swapped in; call /resume_memory_occupation first"

Write = Callable[[], None]


class SglangDraft:
    """The served draft, and the model that is its target. Raises RefusedError if it cannot be swapped."""

    is_read_at_rest = False

    def __init__(self, model: Any, target: nn.Module) -> None:
        if not hasattr(getattr(model, "model", None), "fc") or MAP not in dict(model.named_buffers(recurse=False)):
            raise RefusedError(
                f"{type(model).__name__} is not an EAGLE-3 draft with its own vocabulary, or the plugin did not find its map"
            )
        if getattr(model, "load_lm_head_from_target", False):
            raise RefusedError("the served draft uses the target's head, so no other draft can be swapped in")
        self.config = model.config
        self._model, self._target = model, target
        self._parameters = {
            name.removeprefix("model."): parameter
            for name, parameter in model.named_parameters()
            if name.removeprefix("model.") != EMBEDDING
        }
        packed = [name for name, layer in model.named_modules() if getattr(layer, "use_intel_amx_backend", False)]
        if packed:
            raise RefusedError(f"SGLang has packed the weights of the draft for this CPU ({packed[0]})")
        self.aux_size = int(model.model.fc.weight.shape[1])
        self.dtype: torch.dtype = model.model.fc.weight.dtype
        self.device: torch.device = model.model.fc.weight.device

    def part(self, prepared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All of it: several ranks cut their parts before (`ranks.layout`)."""
        return prepared

    def num_rows(self, name: str) -> int:
        """Rows of a weight as SGLang holds it, with padding."""
        return len(self._parameters[name])

    def prepare(self, prepared: Mapping[str, Tensor], d2t: Tensor) -> Sequence[Write]:
        """The writes that replace all weights; slow, and without effect until they run."""
        if prepared.keys() != self._parameters.keys():
            raise RefusedError(
                f"the served draft has the parameters {sorted(self._parameters)}, but the checkpoint has"
                f" {sorted(prepared)}"
            )
        writes = []
        for name, parameter in self._parameters.items():
            value = _padded(prepared[name], parameter.shape) if name == HEAD else prepared[name]
            if value.shape != parameter.shape:
                raise RefusedError(
                    f"{name} has shape {tuple(prepared[name].shape)}, but SGLang holds {tuple(parameter.shape)}"
                )
            writes.append(_copy(parameter, value))
        return [*writes, _copy(self._map(), target_ids(d2t))]

    def kept(self) -> Sequence[Write]:
        """The writes that restore all weights as they are now; on a GPU they hold a copy in pinned memory."""
        return [_copy(held, _copied(held)) for held in (*self._parameters.values(), self._map())]

    def readers(self) -> Mapping[str, Sequence[Callable[[], Tensor]]]:
        """How to read each weight."""
        rows = {HEAD: int(self.config.draft_vocab_size)}
        weights = {name: [partial(_copied, parameter, rows.get(name))] for name, parameter in self._parameters.items()}
        return {**weights, "d2t": [self._d2t]}

    def target(self) -> Mapping[str, Tensor]:
        """The embedding, and some of the target's other weights."""
        return watched(self._target, self._model)

    def _map(self) -> Tensor:
        held: Tensor = getattr(self._model, MAP)
        return held

    def _d2t(self) -> Tensor:
        token_ids = _copied(self._map())
        return token_ids - torch.arange(len(token_ids))


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    """The value, followed by rows of zeros, as SGLang pads a vocabulary."""
    missing = shape[0] - len(value)
    return torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) if missing > 0 else value


def _copy(held: Tensor, value: Tensor) -> Write:
    """The new value waits in pinned memory if it goes to a GPU."""
    ready = value.to(held.dtype)
    if held.is_cuda:
        ready = ready.pin_memory()

    def write() -> None:
        with torch.inference_mode():
            held.copy_(ready, non_blocking=True)

    return write


def _copied(held: Tensor, rows: int | None = None) -> Tensor:
    with torch.inference_mode():
        return held.detach()[:rows].to("cpu", copy=True)

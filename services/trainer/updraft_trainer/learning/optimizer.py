"""AdamW, whose moments may be divided among the ranks (ZeRO stage 1, arXiv 1910.02054).

Each rank then updates its part of every tensor, and sends it to the others. The gradients are whole everywhere, so the weights
are those that one process would have. Rejected: FSDP2, see ADR 0049.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from updraft_trainer.coordination.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class DraftOptimizer:
    """Updates the trained tensors of a draft. `is_sharded` and the order of calls are the same on all ranks."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks, *, is_sharded: bool) -> None:
        self._parameters = parameters
        self._ranks = ranks
        self.is_sharded = is_sharded
        self._adamw = torch.optim.AdamW(
            [self._own(one.detach()) for one in parameters] if is_sharded else parameters,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self._collected: dict[str, Any] | None = self._adamw.state_dict()
        """At rank 0 the moments of all ranks, in host memory, while they are those of the last step."""

    def zero_grad(self) -> None:
        for one in self._parameters:
            one.grad = None

    def step(self, learning_rate: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        if not self.is_sharded:
            self._adamw.step()
            return
        for part, whole in zip(self._parts, self._parameters, strict=True):
            part.grad = None if whole.grad is None else self._own(whole.grad)
        self._adamw.step()
        for part in self._parts:
            part.grad = None
        for rank in range(self._ranks.size):
            self._ranks.broadcast([_split(one.detach(), self._ranks.size)[rank] for one in self._parameters], rank)
        self._collected = None

    def reset(self) -> None:
        """Forget all gradients' moments."""
        self._adamw.state.clear()
        self._collected = self._adamw.state_dict()

    def forget(self, parameter: Tensor) -> None:
        """Forget the moments of one tensor, if it is trained."""
        for index, one in enumerate(self._parameters):
            if one is parameter:
                self._adamw.state.pop(self._parts[index], None)
                if self._collected is not None:
                    self._collected["state"].pop(index, None)

    def collect(self) -> None:
        """Send the moments of all ranks to rank 0, so that its `state_dict` is whole. All ranks call it."""
        if not self.is_sharded or self._collected is not None:
            return
        own = self._adamw.state_dict()
        of_all = {index: self._whole(index, moments) for index, moments in own["state"].items()}
        self._collected = {"state": of_all, "param_groups": own["param_groups"]}

    def state_dict(self) -> dict[str, Any]:
        """That of AdamW with whole tensors, at rank 0."""
        if not self.is_sharded:
            return self._adamw.state_dict()
        assert self._collected is not None, "all ranks call collect() first"
        return self._collected

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Every rank is given the whole state, and keeps a copy of its part."""
        if not self.is_sharded:
            self._adamw.load_state_dict(dict(state))
            return
        own = {
            index: {name: self._own(value).clone() if name in MOMENTS else value for name, value in moments.items()}
            for index, moments in state["state"].items()
        }
        self._adamw.load_state_dict({"state": own, "param_groups": state["param_groups"]})
        self._collected = {**state, "state": dict(state["state"])}

    @property
    def _parts(self) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = self._adamw.param_groups[0]["params"]
        return parts

    def _own(self, tensor: Tensor) -> Tensor:
        """This rank's part; it shares the tensor's memory if that is contiguous."""
        return _split(tensor, self._ranks.size)[self._ranks.rank]

    def _whole(self, index: int, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameter = self._parameters[index]
        sizes = [part.numel() for part in _split(parameter.detach(), self._ranks.size)]
        of_all = {name: self._ranks.concatenated(moments[name], sizes) for name in MOMENTS}
        shaped = {name: tensor.view_as(parameter) for name, tensor in of_all.items() if len(tensor)}
        return {"step": moments["step"].cpu().clone(), **shaped}


def _split(tensor: Tensor, count: int) -> Sequence[Tensor]:
    return tensor.reshape(-1).tensor_split(count)

"""The rows that a plugin sent are held against a `transformers` forward over the same tokens, in float32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
import torch
from tests.support.tap_agent import Teacher
from tests.support.tiny_target import LAYERS
from torch import Tensor
from transformers import LlamaForCausalLM

S = TypeVar("S")

_TAPS = (2, LAYERS // 2, LAYERS - 3)
_TOLERANCE = 2e-4
"""Of float32 sums in another order; states and log-probabilities are of the order of 1 to 10."""


@dataclass(frozen=True, kw_only=True)  # no slots: in Python 3.11 Setting[S](...) would raise a TypeError
class Setting(Generic[S]):
    """A server with the plugin, and the files that it was started with."""

    server: S
    folder: Path
    socket: Path
    target: LlamaForCausalLM


def read_target(folder: Path) -> LlamaForCausalLM:
    """The target as `transformers` runs it."""
    target: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    target.eval()  # type: ignore[no-untyped-call]  # transformers
    return target


class Reference:
    """`transformers` over one text: states and logits of each position."""

    def __init__(self, target: LlamaForCausalLM, ids: list[int]) -> None:
        with torch.no_grad():
            out = target(torch.tensor([ids]), output_hidden_states=True)
        self.aux = torch.cat([out.hidden_states[tap][0] for tap in _TAPS], -1)
        self.logits = out.logits[0]
        self.log_p = self.logits.log_softmax(-1)

    def check(self, position: int, aux: Tensor | None, teacher: Teacher | None) -> None:
        if aux is not None:
            _assert_close(aux, self.aux[position])
        if teacher is not None:
            _assert_close(teacher.log_sum_exp, self.logits[position].logsumexp(-1))
            _assert_close(teacher.log_probs, self.log_p[position].topk(len(teacher.ids)).values)
            _assert_close(teacher.log_probs, self.log_p[position][teacher.ids.long()])


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=_TOLERANCE, rtol=_TOLERANCE)


def check_step(
    target: LlamaForCausalLM,
    text: list[int],
    reference: Reference,
    step: dict[str, Any],
    rejected: list[tuple[Tensor, Teacher]],
) -> None:
    """The drafts' log-probabilities, and the rows that read rejected draft tokens."""
    position, accepted, drafts = step["position"], step["accepted"], step["drafts"]
    branch = reference
    if accepted < len(drafts):
        branch = Reference(target, [*text[: position + 1], *drafts])
    for i, draft in enumerate(drafts):
        assert step["log_p"][i] == pytest.approx(float(branch.log_p[position + i, draft]), abs=1e-3)
    for n, (aux, teacher) in enumerate(rejected):
        branch.check(position + accepted + 1 + n, aux, teacher)

"""Rotary tables are those of transformers, far beyond the original context too; gradients are those of torch."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from updraft_artifacts.rope import Rope
from updraft_draft.config import DraftConfig
from updraft_draft.layers import gated, rms_norm, rotary_table

NUM_POSITIONS = 20_000
_QWEN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}
_STRETCHES: dict[str, dict[str, Any]] = {
    "as Qwen says": _QWEN,
    "original context unsaid": {key: _QWEN[key] for key in ("rope_type", "rope_theta", "factor")},
    "attention factor": _QWEN | {"attention_factor": 0.9},
    "two scales": _QWEN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "one scale": _QWEN | {"mscale": 0.7},
    "other turns": _QWEN | {"factor": 2.7, "beta_fast": 20.0, "beta_slow": 3},
    "not truncated": _QWEN | {"truncate": False},
    "nothing turns": _QWEN | {"original_max_position_embeddings": 6},
    "all turns": _QWEN | {"rope_theta": 5.0, "beta_fast": 300},
}


def theirs(config: LlamaConfig | Qwen3Config, head_dim: int) -> tuple[Tensor, Tensor]:
    rotary = LlamaRotaryEmbedding(config) if isinstance(config, LlamaConfig) else Qwen3RotaryEmbedding(config)
    cos, sin = rotary(torch.empty(1), torch.arange(NUM_POSITIONS)[None])
    sin[..., : head_dim // 2] *= -1
    return cos[0], sin[0]


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """But for cosines that another order of the loop rounds: a frequency's last bit is a hundred times as much at the end."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("said", list(_STRETCHES))
def test_yarn_turns_as_in_transformers(config: type[LlamaConfig | Qwen3Config], said: str) -> None:
    parameters = dict(_STRETCHES[said])
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 16384,
    }
    expected = theirs(config(**sizes, rope_parameters=dict(parameters)), 128)
    rope = Rope.of_config({"rope_parameters": parameters, "max_position_embeddings": 16384})
    for actual, wanted in zip(rotary_table(NUM_POSITIONS, 128, rope), expected, strict=True):
        assert_equal(actual, wanted)


@pytest.mark.parametrize("said", list(_STRETCHES))
def test_a_draft_turns_in_other_engines_as_it_does_here(said: str) -> None:
    """vLLM and SGLang read what `DraftConfig.to_json` writes through transformers."""
    rope = Rope.of_config({"rope_parameters": _STRETCHES[said], "max_position_embeddings": 16384})
    config = DraftConfig(
        vocab_size=64,
        draft_vocab_size=64,
        hidden_size=256,
        intermediate_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=rope,
        max_position=16384,
        target_hidden_size=256,
        aux_layers=(2, 4, 5),
    )
    written = json.loads(config.to_json())
    assert DraftConfig.from_dict(written) == config
    for actual, wanted in zip(rotary_table(NUM_POSITIONS, 128, rope), theirs(LlamaConfig(**written), 128), strict=True):
        assert_equal(actual, wanted)


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return [one.float() for one in torch.autograd.grad((out.float() * weights).sum(), inputs)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_norm_has_the_gradients_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, 5, 24, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(24, generator=generator).requires_grad_()
    own, wanted = rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), (24,), weight.double(), 1e-5)
    torch.testing.assert_close(own.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        gradients(own, x, weight), gradients(wanted, x, weight), rtol=tolerance, atol=4 * tolerance
    )
    assert own.dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_gate_has_the_gradients_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    gate, up = (3 * torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))).to(dtype)
    gate.requires_grad_()
    up.requires_grad_()
    wanted = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(gated(gate, up).double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        gradients(gated(gate, up), gate, up), gradients(wanted, gate, up), rtol=tolerance, atol=4 * tolerance
    )


def test_inner_values_of_norms_and_gates_are_not_kept() -> None:
    """A draft's memory in training is what its backward pass needs, mostly of these."""
    kept = list[Tensor]()

    def pack(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    x = torch.randn(64, 24, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        gated(rms_norm(x, torch.ones(24, requires_grad=True), 1e-5), x).sum()
    assert sum(one.nbytes for one in kept) <= 3 * x.nbytes + 1024

"""A real SGLang serves other families than Llama, also one that the torch engine does not run, with drafts for them.

Not those with sliding windows, as Gemma 3: the stand-in for SGLang's kernels knows plain causal attention only.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.engine_contract import NUM_SLOTS, asking, whole
from tests.sglang import build
from tests.sglang.models import draft_vocabulary, write_tokenizer
from tests.support import families
from tests.support.families import randomise
from tests.support.tiny_target import DRAFT_VOCAB, VOCAB, make_draft, save_draft
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import DraftCheckpoint, FinishedRequest
from updraft_inference.sglang_engine import launcher
from updraft_inference.sglang_engine.engine import SglangOptions
from updraft_inference.torch_engine.model.config import TargetConfig

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(120)]

CONTEXT = 128


def mixture(folder: Path) -> PreTrainedModel:
    """A random Qwen 3 mixture of experts, saved with the tokenizer of VOCAB tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    model = randomise(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def dense(name: str, folder: Path) -> PreTrainedModel:
    """A random model of a family that the torch engine runs too, saved with the tokenizer of VOCAB tokens."""
    model = families.make(name, folder)
    write_tokenizer(folder)
    return model


def test_the_mixture_is_one_that_the_torch_engine_does_not_run(tmp_path: Path) -> None:
    mixture(tmp_path)
    with pytest.raises(InvalidInput, match="serve it with engine sglang"):
        TargetConfig.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["qwen 3 MoE", "qwen2", "qwen3", "mistral"])
async def test_a_family_is_served_with_drafts_that_change_nothing(
    name: str, tmp_path: Path, short_tmp_path: Path
) -> None:
    target, heard = tmp_path / "target", list[FinishedRequest]()
    model: Any = mixture(target) if name == "qwen 3 MoE" else dense(name, target)  # mypy knows no `generate` of it
    cpu = "--device cpu --attention-backend intel_amx --disable-cuda-graph --mem-fraction-static 0.2"
    plan = launcher.LaunchOptions(
        python=build.python(),
        folder=tmp_path / "sglang",
        num_steps=2,
        num_slots=NUM_SLOTS,
        max_context=CONTEXT,
        dtype="float32",
        shape=ShapeChoice(draft_vocab_size=DRAFT_VOCAB),
        extra=f"{cpu} --max-total-tokens 4096",
        admin_key="the admin key",
        may_restart=True,
        drain_s=30.0,
    )
    options = SglangOptions(model=target, socket=short_tmp_path / "s", note=tmp_path / "swap", max_context=CONTEXT)
    environ = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    prompt = torch.tensor([asking("a").prompt_ids])
    full = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = full[0, prompt.shape[1] :].tolist()
    async with launcher.started(plan, options, environ, heard.append, lambda: False) as engine:
        assert engine.info.vocab_size == VOCAB
        assert (await whole(engine, asking("a", max_tokens=24)))[0] == expected
        folder = tmp_path / "1"
        digest = save_draft(make_draft(target, seed=3, token_ids=draft_vocabulary(target)), folder)
        swapped = await engine.swap(DraftCheckpoint(version=1, folder=folder, tensors_digest=digest))
        assert swapped.loaded.version == 1
        tokens, finished = await whole(engine, asking("b", max_tokens=24))
        assert tokens == expected
        assert {step.draft_version for step in finished.steps} == {1}

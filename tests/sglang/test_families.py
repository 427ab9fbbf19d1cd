"""A real SGLang serves other families than Llama, also one that the torch engine does not run, with drafts for them.

Not those with sliding windows, as Gemma 3: the stand-in for SGLang's kernels knows plain causal attention only.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sglang.agent import beside, greedy, load
from tests.sglang.models import draft_vocabulary, write_tokenizer
from tests.sglang.server import Server
from tests.support import families
from tests.support.families import randomise
from tests.support.tiny_target import DRAFT_VOCAB, VOCAB, make_draft, save_draft
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import InvalidInput
from updraft_inference.launch import sglang_arguments
from updraft_inference.tap import initial_draft, plugin_folder
from updraft_inference.tap.server_kind import SGLANG
from updraft_inference.torch_engine.model.config import TargetConfig

pytestmark = [pytest.mark.timeout(900), pytest.mark.lasts(120)]

PROMPT = [7 + position % 90 for position in range(20)]


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
    target = tmp_path / "target"
    model: Any = mixture(target) if name == "qwen 3 MoE" else dense(name, target)  # mypy knows no `generate` of it
    full = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = full[0, len(PROMPT) :].tolist()
    seed = initial_draft.write(target, tmp_path / "seed", ShapeChoice(draft_vocab_size=DRAFT_VOCAB))
    save_draft(make_draft(target, seed=3, token_ids=draft_vocabulary(target)), tmp_path / "1")
    server = Server(
        target,
        tmp_path / "server.log",
        arguments=sglang_arguments.speculation(seed, 2),
        plugins=[plugin_folder.write(tmp_path / "plugin")],
        variables={SGLANG.socket_variable: str(short_tmp_path / "s"), "UPDRAFT_SGLANG_DRAFTING": "trained"},
    )
    with server:
        async with beside(short_tmp_path / "s") as agent:
            assert await greedy(server, PROMPT, 24) == expected
            assert (await load(agent, tmp_path / "1", 1))["refusal"] == ""
            assert await greedy(server, PROMPT, 24) == expected
            await agent.settle()
            first, second = agent.finished.values()
    assert first[0]["counters"] == [], "the first draft knows nothing, so no step drafts"
    assert [counted["version"] for counted in second[0]["counters"]] == [1]

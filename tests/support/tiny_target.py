"""A tiny Llama-family target on disk, and drafts for it: random weights, deterministic, built in milliseconds."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.draft_shape import ShapeChoice
from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork, initial_network
from updraft_draft.target_weights import read_head

VOCAB = 512
HIDDEN = 64
LAYERS = 8
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
INNER = 128
DRAFT_VOCAB = 256


def make_tiny_target(folder: Path, *, seed: int = 0, is_tied: bool = True) -> Path:
    """Write config.json and model.safetensors of a random Llama with the sizes above; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.5 / math.sqrt(shape[-1]))

    tensors = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN) * 2,
        "model.norm.weight": torch.ones(HIDDEN),
    }
    if not is_tied:
        tensors["lm_head.weight"] = random(VOCAB, HIDDEN) * 2
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_draft(
    target: Path, *, seed: int = 0, token_ids: Tensor | None = None, shape: ShapeChoice | None = None
) -> DraftNetwork:
    """An untrained draft over the target's first tokens, by default of the target's shape."""
    head = read_head(target)
    ids = torch.arange(DRAFT_VOCAB) if token_ids is None else token_ids
    config = head.draft(shape, draft_vocab_size=len(ids))
    return initial_network(config, head.embedding.float(), head.rows(ids), head.final_norm, ids, seed=seed)


def every_second_token(first: int) -> Tensor:
    """A vocabulary of DRAFT_VOCAB tokens: the even ones or the odd ones."""
    return torch.arange(first % 2, VOCAB, 2)


def save_draft(network: DraftNetwork, folder: Path) -> str:
    """Write the checkpoint; return its tensors digest."""
    checkpoint.save(network, folder)
    return tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(network)))

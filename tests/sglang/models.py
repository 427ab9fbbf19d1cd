"""Targets and drafts for a real SGLang, made in milliseconds and the same each time; SmolLM2 from its package.

The cycle target goes round the 95 printable characters in a fixed order: its layers add nothing, so its state is the last
token's embedding and its head a lookup. A draft for it knows as much of that order as one likes, hence how much of it is
accepted is known beforehand. The random target writes what no one foresees: it is for comparing numbers.
"""

import json
import os
from pathlib import Path

import torch
from google.protobuf import json_format
from safetensors.torch import load_file, save_file
from tests.support.tiny_target import (
    DRAFT_VOCAB,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCAB,
    make_draft,
    make_tiny_target,
)
from tests.support.tiny_tokenizer import END, START, TEMPLATE, byte_level
from torch import Tensor

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import transfer
from updraft_artifacts.digests import file_digest, tensors_digest
from updraft_artifacts.model_folder import target_fingerprint, tokenizer_fingerprint
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_draft import checkpoint, vocabulary
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import read_head

_PRINTABLE = range(32, 127)
_WIDTH = KV_HEADS * HEAD_DIM
"""How much of an embedding the draft carries through its attention."""
_SHARPNESS = 8.0
"""Of the draft's attention: a row sees nothing but itself."""


def cycle() -> list[int]:
    """The characters in the target's order."""
    order = torch.randperm(len(_PRINTABLE), generator=torch.Generator().manual_seed(1))
    return [_PRINTABLE[i] for i in order.tolist()]


def continuation(prompt: str, num_tokens: int) -> list[int]:
    """What the cycle target says after a prompt that ends with a printable character."""
    order = cycle()
    start = order.index(ord(prompt[-1])) + 1
    return [order[(start + i) % len(order)] for i in range(num_tokens)]


def write_cycle_target(folder: Path) -> Path:
    """A target of the sizes of tests.support.tiny_target, with a tokenizer."""
    make_tiny_target(folder, is_tied=False)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            tensor.zero_()
    embedding = _embedding()
    order = cycle()
    weights["model.embed_tokens.weight"] = embedding
    weights["lm_head.weight"][order[1:] + order[:1]] = embedding[order]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_mixing_target(folder: Path) -> Path:
    """The cycle target, with layers that add something: what a row says depends on all before it, and drafts are accepted."""
    write_cycle_target(folder)
    noise = load_file(make_tiny_target(folder / "noise") / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = 0.4 * noise[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_random_target(folder: Path, *, seed: int = 0) -> Path:
    """The random Llama of tests.support.tiny_target, with a tokenizer."""
    make_tiny_target(folder, seed=seed)
    write_tokenizer(folder)
    return folder


def cycle_draft(target: Path, *, quality: float = 1.0, token_ids: Tensor | None = None) -> DraftNetwork:
    """A draft that proposes the right character after this share of all characters.

    Its attention copies the newest token's embedding and takes away the state that it started from, so what it goes on
    with is that embedding. Its default vocabulary is that of an engine's first draft.
    """
    network = make_draft(target, token_ids=draft_vocabulary(target) if token_ids is None else token_ids)
    attention = network.midlayer.self_attn
    eye = torch.eye(_WIDTH)
    per_kv_head = HEADS // KV_HEADS
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.zero_()
        for head in range(HEADS):
            own, shared = _block(head), _block(head // per_kv_head)
            attention.q_proj.weight[own, shared] = _SHARPNESS * torch.eye(HEAD_DIM)
            if head % per_kv_head == 0:  # the others say the same
                attention.o_proj.weight[shared, own] = torch.eye(HEAD_DIM)
        attention.k_proj.weight[:, :_WIDTH] = _SHARPNESS * eye
        attention.v_proj.weight[:, :_WIDTH] = eye
        attention.v_proj.weight[:, HIDDEN : HIDDEN + _WIDTH] = -eye
        network.midlayer.hidden_norm.weight.fill_((_WIDTH / HIDDEN) ** 0.5)  # gives back the state as it was
        rows = torch.searchsorted(network.token_ids, torch.tensor(_proposals(quality)))
        network.lm_head.weight[rows, :_WIDTH] = _embedding()[cycle(), :_WIDTH]
    return network


def draft_vocabulary(target: Path) -> Tensor:
    """The tokens that an engine's first draft for `target` can propose, int64."""
    config = read_head(target).config
    return vocabulary.choose(torch.zeros(config.vocab_size), always=config.eos_token_ids, size=DRAFT_VOCAB)


def write_version(target: Path, folder: Path, version: int, network: DraftNetwork) -> Path:
    """`folder`/<version> as a download from a registry leaves it."""
    path = folder / str(version)
    checkpoint.save(network, path)
    weights = path / checkpoint.WEIGHTS
    specs = checkpoint.tensor_specs(checkpoint.checkpoint_tensors(network))
    manifest = registry_pb2.Manifest(
        speculator="default",
        digest=file_digest(weights),
        size_bytes=weights.stat().st_size,
        tensors=specs,
        tensors_digest=tensors_digest(specs),
        config_json=(path / checkpoint.CONFIG).read_text(),
        target_fingerprint=target_fingerprint(target),
        tokenizer_fingerprint=tokenizer_fingerprint(target),
        draft_vocabulary_fingerprint=checkpoint.vocabulary_fingerprint(network.token_ids),
        source=registry_pb2.SOURCE_IMPORTED,
    )
    (path / transfer.MANIFEST).write_text(json_format.MessageToJson(manifest))
    return path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct from the packaged GGUF, converted once into the cache."""
    return model_folder(cache_folder(os.environ))


def _embedding() -> Tensor:
    """float32 [VOCAB, HIDDEN]; each head's part has the same length for all tokens, so none is nearer than the same."""
    table = torch.randn(VOCAB, HIDDEN // HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    even: Tensor = table / table.norm(dim=2, keepdim=True) * HEAD_DIM**0.5
    return even.flatten(1)


def _block(head: int) -> slice:
    return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)


def _proposals(quality: float) -> list[int]:
    """What the draft says after each character of the cycle: the next one, or for some of them another's next."""
    order = cycle()
    following = order[1:] + order[:1]
    shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(3)).tolist()
    wrong = shuffled[round(quality * len(order)) :]
    for place, other in zip(wrong, wrong[1:] + wrong[:1], strict=True):
        following[place] = order[(other + 1) % len(order)]
    return following


def write_tokenizer(folder: Path) -> None:
    """Token b is byte b, token i above the special ones is written <i>; config.json names the same special tokens."""
    tokenizer = byte_level()
    tokenizer.add_tokens([f"<{i}>" for i in range(END + 1, VOCAB)])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": START, "eos_token_id": END}))

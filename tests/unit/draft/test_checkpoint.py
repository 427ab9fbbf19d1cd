"""A checkpoint folder says exactly what it holds, and nothing else is loaded from it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft
from torch import Tensor

from updraft_artifacts.digests import tensors_digest
from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork


@pytest.fixture
def draft(tmp_path: Path) -> DraftNetwork:
    return make_draft(make_tiny_target(tmp_path / "target"))


def test_a_saved_draft_comes_back_equal(draft: DraftNetwork, tmp_path: Path) -> None:
    digest = save_draft(draft, tmp_path / "draft")
    config, tensors = checkpoint.load(tmp_path / "draft")
    assert config == draft.config
    again = checkpoint.build(config, tensors, draft.embedding)
    assert tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(again))) == digest


def test_the_expected_shapes_are_those_of_a_network(draft: DraftNetwork) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    assert checkpoint.expected_shapes(draft.config) == shapes


def test_a_draft_is_loaded_without_the_compiler_of_torch(draft: DraftNetwork, tmp_path: Path) -> None:
    """In a process of its own, where no other test has imported it. It would take 130 MB for good."""
    save_draft(draft, tmp_path / "draft")
    script = (
        "import sys, pathlib, torch; from updraft_draft import checkpoint; "
        f"config, tensors = checkpoint.load(pathlib.Path({str(tmp_path / 'draft')!r})); "
        "checkpoint.build(config, tensors, torch.zeros(config.vocab_size, config.hidden_size)); "
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "False"


def test_one_changed_value_changes_the_digest(draft: DraftNetwork) -> None:
    before = tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(draft)))
    with torch.no_grad():
        draft.fc.weight[0, 0] += 1
    assert tensors_digest(checkpoint.tensor_specs(checkpoint.checkpoint_tensors(draft))) != before


def test_the_names_and_the_config_are_those_that_stock_engines_load(draft: DraftNetwork, tmp_path: Path) -> None:
    save_draft(draft, tmp_path / "draft")
    names = set(load_file(tmp_path / "draft" / "model.safetensors"))
    layer = {f"midlayer.self_attn.{p}_proj.weight" for p in "qkvo"} | {
        f"midlayer.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }
    norms = {f"midlayer.{n}.weight" for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    assert names == layer | norms | {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == 256
    assert config["tie_word_embeddings"] is False


def _with_nan(tensors: dict[str, Tensor]) -> None:
    tensors["fc.weight"][0, 0] = float("nan")


def _without_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]


def _with_embedding(tensors: dict[str, Tensor]) -> None:
    tensors["embed_tokens.weight"] = torch.zeros(4, 4)


def _with_wrong_shape(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = torch.ones(3)


def _in_float32(tensors: dict[str, Tensor]) -> None:
    tensors["fc.weight"] = tensors["fc.weight"].float()


def _in_float16(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].half()


def _with_small_offsets(tensors: dict[str, Tensor]) -> None:
    tensors["d2t"] = tensors["d2t"].int()


def _with_tokens_outside(tensors: dict[str, Tensor]) -> None:
    tensors["d2t"] = tensors["d2t"] + 500


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        pytest.param(_with_nan, Corrupt, "not finite", id="not a number"),
        pytest.param(_without_head, InvalidInput, "lm_head.weight", id="missing tensor"),
        pytest.param(_with_embedding, InvalidInput, "embed_tokens", id="an embedding would overwrite the target's"),
        pytest.param(_with_wrong_shape, InvalidInput, "shape", id="wrong shape"),
        pytest.param(_in_float32, InvalidInput, "fc.weight is F32, a draft holds it as BF16", id="fp32 is not rounded"),
        pytest.param(_in_float16, InvalidInput, "norm.weight is F16", id="fp16 is not converted"),
        pytest.param(_with_small_offsets, InvalidInput, "d2t is torch.int32", id="another integer"),
        pytest.param(_with_tokens_outside, InvalidInput, "d2t", id="tokens outside the vocabulary"),
    ],
)
def test_a_damaged_draft_is_refused_with_the_reason(
    draft: DraftNetwork,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], None],
    error: type[Exception],
    words: str,
) -> None:
    save_draft(draft, tmp_path / "draft")
    file = tmp_path / "draft" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(error, match=words):
        checkpoint.load(tmp_path / "draft")


def test_a_truncated_file_is_corrupt(draft: DraftNetwork, tmp_path: Path) -> None:
    save_draft(draft, tmp_path / "draft")
    file = tmp_path / "draft" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Corrupt, match="safetensors"):
        checkpoint.load(tmp_path / "draft")


def test_an_empty_folder_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        checkpoint.load(tmp_path)

"""A GGUF file becomes the model that it was made of."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tests.support import families, gguf_files
from transformers import PreTrainedModel

from updraft_chassis.errors import Conflict, InvalidInput
from updraft_cli.__main__ import cli
from updraft_cli.models import bfloat16
from updraft_cli.models.architectures import ARCHITECTURES
from updraft_cli.models.smollm2 import convert_file
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.model.target import Target

_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127)


@given(st.lists(_FLOATS, min_size=1, max_size=64))
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    floats = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(floats).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert bfloat16.bits(floats).tolist() == expected.tolist()
    assert bfloat16.bits(bfloat16.values(bfloat16.bits(floats))).tolist() == expected.tolist()


def test_a_tie_goes_to_the_even_neighbour() -> None:
    below_even, below_odd = 0x3F800000 | 0x8000, 0x3F810000 | 0x8000
    ties = np.array([below_even, below_odd], dtype=np.uint32).view(np.float32)
    assert bfloat16.bits(ties).tolist() == [0x3F80, 0x3F82]


@pytest.mark.parametrize(
    ("gguf_name", "expected"),
    [
        pytest.param("token_embd.weight", "model.embed_tokens.weight", id="embedding"),
        pytest.param("output_norm.weight", "model.norm.weight", id="last norm"),
        pytest.param("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight", id="attention"),
        pytest.param("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", id="norm"),
    ],
)
def test_tensors_get_the_names_of_transformers(gguf_name: str, expected: str) -> None:
    assert ARCHITECTURES["llama"].hugging_face_name(gguf_name) == expected


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "llama": ("llama", lambda: families.llama(tie_word_embeddings=True)),
    "llama, untied, linear rope": ("llama", families.FAMILIES["llama, linear rope"]),
    "llama 3": ("llama", lambda: families.llama(rope_parameters=_LLAMA3, head_dim=32)),
    "mistral": ("llama", families.FAMILIES["mistral"]),
    "qwen2": ("qwen2", families.FAMILIES["qwen2"]),
    "qwen3": ("qwen3", families.FAMILIES["qwen3"]),
    "gemma3": (
        "gemma3",
        lambda: families.gemma3(query_pre_attn_scalar=24, rope_parameters=None, sliding_window_pattern=6),
    ),
}


def _no_progress(_what: str, _fraction: float) -> None:
    pass


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """The folder that a model was published in, as far as a conversion needs it."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "hello"}')
    return folder


@pytest.mark.parametrize("name", list(_MODELS))
def test_a_converted_model_says_what_the_original_says(tmp_path: Path, tokenizer: Path, name: str) -> None:
    architecture, build = _MODELS[name]
    model = families.randomise(build())
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # what the folder holds
    file = gguf_files.write(model, architecture, tmp_path / "model.gguf")
    folder = tmp_path / "converted"
    convert_file(file, folder, tokenizer, _no_progress)
    target = Target.open(folder, dtype=torch.float32, device=torch.device("cpu"))
    c = target.config
    shape = CacheShape(
        num_layers=c.num_layers, num_slots=1, num_positions=64, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim
    )
    cache = SlotCache(shape, like=target.embedding)
    ids = torch.randint(3, families.VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    forward = target.forward(ids[0], [cache.batch([0], [0], [40])], cache)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(target.logits(forward.last), expected[0], rtol=1e-3, atol=1e-3)
    assert c.eos_token_ids == {2, 7}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"chat_template": "hello"}


def test_a_family_that_is_not_known_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidInput, match="holds a mamba; supported are llama, qwen2, qwen3, gemma3"):
        convert_file(tmp_path / "model.gguf", tmp_path / "converted", None, _no_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_tokenizer_that_cannot_be_rebuilt_is_asked_for(tmp_path: Path) -> None:
    said = {"ggml.model": "gpt2", "ggml.pre": "qwen2"}
    model = families.randomise(families.FAMILIES["qwen2"]())
    file = gguf_files.write(model, "qwen2", tmp_path / "model.gguf", tokenizer=said)
    with pytest.raises(InvalidInput, match=r"\(gpt2 qwen2\) cannot be rebuilt.*--tokenizer"):
        convert_file(file, tmp_path / "converted", None, _no_progress)


def test_a_table_of_another_stretch_than_llama_3s_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    model = families.randomise(families.llama(rope_parameters=_LLAMA3 | {"original_max_position_embeddings": 512}))
    file = gguf_files.write(model, "llama", tmp_path / "model.gguf")
    with pytest.raises(InvalidInput, match="is not Llama 3's"):
        convert_file(file, tmp_path / "converted", tokenizer, _no_progress)


def test_an_existing_folder_and_a_file_that_is_no_gguf_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no model at all, and long enough to be looked at")
    with pytest.raises(Conflict, match="exists"):
        convert_file(tmp_path / "model.gguf", tokenizer, None, _no_progress)
    with pytest.raises(InvalidInput, match="is not a complete GGUF file"):
        convert_file(tmp_path / "model.gguf", tmp_path / "new", None, _no_progress)


def test_the_command_prints_the_folder_that_it_made(tmp_path: Path, tokenizer: Path) -> None:
    file = gguf_files.write(families.randomise(families.llama()), "llama", tmp_path / "model.gguf")
    result = CliRunner().invoke(
        cli, ["model", "convert", str(file), str(tmp_path / "new"), "--tokenizer", str(tokenizer)]
    )
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'new'}\n")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]

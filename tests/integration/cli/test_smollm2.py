"""The converted SmolLM2 is the model: same weights, same tokens, and it knows the capital of France."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import SMOLLM2, model_folder, packaged_file

_TEXT = "def f(x): return 1234 + x  # été 中文\n\tSELECT * FROM t; <|im_start|>user\n"

_CONVERT = """
import pathlib, resource, sys
from updraft_cli.models.smollm2 import model_folder
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
model_folder(pathlib.Path(sys.argv[1]))
"""


@pytest.fixture(scope="session")
def folder() -> Path:
    return model_folder(cache_folder(os.environ))


@pytest.fixture(scope="session")
def source() -> gguf.GGUFReader:
    return gguf.GGUFReader(packaged_file(SMOLLM2))


@pytest.mark.parametrize("part", ["attn_v", "ffn_down", "attn_norm"])
def test_weights_are_the_dequantised_ones(folder: Path, source: gguf.GGUFReader, part: str) -> None:
    names = {"attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    expected = torch.from_numpy(_dequantised(source, f"blk.7.{part}.weight")).to(torch.bfloat16)
    assert torch.equal(_tensor(folder, f"model.layers.7.{names[part]}.weight"), expected)


def test_query_rows_are_back_in_the_order_of_transformers(folder: Path, source: gguf.GGUFReader) -> None:
    # llama.cpp stores row 2i of a head for dimension i and row 2i+1 for dimension i+32.
    rows = torch.from_numpy(_dequantised(source, "blk.7.attn_q.weight")).to(torch.bfloat16)
    head = _tensor(folder, "model.layers.7.self_attn.q_proj.weight")[:64]
    assert torch.equal(head[:32], rows[0:64:2])
    assert torch.equal(head[32:], rows[1:64:2])


def test_text_survives_the_tokenizer_and_transformers_reads_the_same_ids(folder: Path) -> None:
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(_TEXT).ids
    assert ours.decode(ids, skip_special_tokens=False) == _TEXT
    assert theirs(_TEXT).input_ids == ids


def test_a_chat_ends_where_the_assistant_begins(folder: Path) -> None:
    chat = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "hi 12"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nhi 12<|im_end|>\n<|im_start|>assistant\n")


def test_the_model_knows_the_capital_of_france(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert "is Paris" in answer


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CONVERT, str(tmp_path), "20000000"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Exhausted: cannot write the converted model" in result.stderr
    assert "needs 280 MB" in result.stderr
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_what_a_killed_conversion_left_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "models" / f".{SMOLLM2.folder_name}.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    made = model_folder(tmp_path)
    assert not left.exists()
    assert (made / "model.safetensors").stat().st_size == 269_060_552


def _dequantised(source: gguf.GGUFReader, name: str) -> NDArray[np.float32]:
    tensor = next(tensor for tensor in source.tensors if tensor.name == name)
    return np.array(gguf.dequantize(tensor.data, tensor.tensor_type))


def _tensor(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor

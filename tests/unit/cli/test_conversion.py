import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from updraft_cli import bfloat16
from updraft_cli.conversion import hugging_face_name

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
    assert hugging_face_name(gguf_name) == expected

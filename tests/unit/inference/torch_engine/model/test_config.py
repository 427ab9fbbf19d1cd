"""A config.json that makes no sense is one sentence, before any weight is read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.support import families

from updraft_chassis.errors import InvalidInput
from updraft_inference.torch_engine.model.config import TargetConfig


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gemma3")
    families.make("gemma3", folder)
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": 10**30}, "its hidden_size is 10+, expected 1 to 16,777,216"),
        ({"hidden_size": math.nan}, "its hidden_size is nan"),
        ({"hidden_size": "wide"}, "its hidden_size is 'wide'"),
        ({"num_hidden_layers": 10**9}, "its num_hidden_layers is 1000000000, expected 1 to 1,024"),
        ({"num_hidden_layers": 0}, "its num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "4 heads do not divide into 3 key-value heads"),
        ({"head_dim": 31}, "its head_dim is 31"),
        ({"vocab_size": -1}, "its vocab_size is -1"),
        ({"max_position_embeddings": 10**18}, "its max_position_embeddings is 1000000000000000000"),
        ({"rms_norm_eps": math.nan}, "its rms_norm_eps is nan"),
        ({"rms_norm_eps": 2}, "its rms_norm_eps is 2.0"),
        ({"query_pre_attn_scalar": -1}, "its query_pre_attn_scalar is -1"),
        ({"query_pre_attn_scalar": math.inf}, "its query_pre_attn_scalar is inf"),
        ({"sliding_window": -5}, "its sliding_window is -5"),
        ({"sliding_window": 10**30}, "its sliding_window is 10+"),
        ({"layer_types": 5}, "bad value: 'int' object is not iterable"),
        ({"architectures": 5}, "bad value: 'int' object is not iterable"),
        ({"model_type": None}, "lacks 'model_type'"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_their_name(
    content: dict[str, Any], tmp_path: Path, values: dict[str, Any], sentence: str
) -> None:
    changed = {key: value for key, value in (content | values).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InvalidInput, match=sentence):
        TargetConfig.from_folder(tmp_path)

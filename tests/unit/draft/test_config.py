"""A draft's config.json with a value that makes no sense is refused by its name."""

import json
import math
from typing import Any

import pytest
from tests.support import families

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_chassis.errors import InvalidInput
from updraft_draft.config import DraftConfig
from updraft_draft.target_weights import read_head


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("target")
    families.make("llama", folder)
    values: dict[str, Any] = json.loads(DraftConfig.of_target(read_head(folder).config, ShapeChoice()).to_json())
    return values


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"hidden_size": "wide"}, "bad value: .*'wide'"),
        ({"rms_norm_eps": math.nan}, "its rms_norm_eps is nan, not above 0"),
        ({"rms_norm_eps": 0}, "its rms_norm_eps is 0.0, not above 0"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"num_hidden_layers": 2}, "a draft of 2 layers is not supported"),
        ({"num_key_value_heads": 3}, "4 heads do not divide into 3 key-value heads"),
        ({"draft_vocab_size": 10**9}, "draft_vocab_size 1000000000 is not within 1..512"),
        ({"updraft": {}}, "lacks 'aux_layers'"),
        ({"updraft": {"aux_layers": [2, 2, 5]}}, "layers .* repeat"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(content: dict[str, Any], values: dict[str, Any], sentence: str) -> None:
    assert DraftConfig.from_dict(content).vocab_size == families.VOCAB
    with pytest.raises(InvalidInput, match=sentence):
        DraftConfig.from_dict(content | values)

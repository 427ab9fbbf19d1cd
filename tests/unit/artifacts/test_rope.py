"""What config.json says of rotary embeddings is read as transformers reads it, written for all engines, or refused."""

import math
from typing import Any

import pytest

from updraft_artifacts.rope import Rope
from updraft_chassis.errors import InvalidInput

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
USUAL = 0.1 * math.log(4.0) + 1.0


@pytest.mark.parametrize(
    "said",
    [
        pytest.param({"rope_theta": 1e6}, id="default"),
        pytest.param(YARN | {"rope_type": "linear"}, id="linear"),
        pytest.param(YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, id="llama3"),
        pytest.param(YARN, id="yarn"),
        pytest.param(
            YARN | {"attention_factor": 0.7, "truncate": False, "beta_fast": 16, "beta_slow": 2}, id="all of it"
        ),
        pytest.param(YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, id="yarn of two scales"),
    ],
)
def test_what_is_written_is_read_as_the_same(said: dict[str, Any]) -> None:
    rope = Rope.of(said)
    assert Rope.of_config(rope.to_dict()) == rope


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        pytest.param({}, USUAL, id="the paper's"),
        pytest.param({"attention_factor": 1.0, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.0, id="stated"),
        pytest.param({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4.0) + 1.0) / USUAL, id="two scales"),
        pytest.param({"mscale": 2.0, "mscale_all_dim": 0}, USUAL, id="one scale"),
        pytest.param({"factor": 0.5}, 1.0, id="no longer context"),
    ],
)
def test_engines_that_read_other_keys_scale_attention_alike(said: dict[str, Any], expected: float) -> None:
    """transformers and vLLM use `attention_factor`, SGLang multiplies the paper's by `attn_factor`; none sees a scale."""
    rope = Rope.of(YARN | said)
    written = rope.to_dict()["rope_scaling"]
    usual = 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    assert rope.attention_factor == pytest.approx(expected)
    assert written.get("attention_factor", usual) == pytest.approx(expected)
    assert usual * written.get("attn_factor", 1.0) == pytest.approx(expected)
    assert not {"mscale", "mscale_all_dim"} & set(written)


@pytest.mark.parametrize(
    ("content", "original"),
    [
        pytest.param({}, 40960, id="all positions"),
        pytest.param({"rope_scaling": YARN}, 32768, id="its own"),
        pytest.param({"rope_scaling": YARN, "original_max_position_embeddings": 8192}, 8192, id="beside it"),
    ],
)
def test_the_original_context_is_where_transformers_finds_it(content: dict[str, Any], original: int) -> None:
    unsaid = {key: YARN[key] for key in ("rope_type", "factor")}
    whole = {"rope_theta": 1e6, "max_position_embeddings": 40960, "rope_scaling": unsaid} | content
    assert Rope.of_config(whole).original_max_position == original


def test_a_factor_of_null_is_what_the_contexts_say() -> None:
    content = {"max_position_embeddings": 131072, "rope_scaling": YARN | {"factor": None}}
    assert Rope.of_config(content) == Rope.of(YARN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"factor": 0}, "factor is 0, not between", id="factor 0"),
        pytest.param({"factor": -4.0}, "factor is -4, not between", id="negative"),
        pytest.param({"factor": math.nan}, "factor is nan, not between", id="NaN"),
        pytest.param({"factor": 1e300}, r"factor is 1e\+300, not between", id="huge"),
        pytest.param({"rope_theta": 1.0}, "rope_theta is 1, and yarn requires more than 1", id="theta"),
        pytest.param({"rope_theta": math.inf}, "rope_theta is inf", id="infinite theta"),
        pytest.param({"beta_fast": 2, "beta_slow": 2}, "beta_fast is 2, not above its beta_slow, 2", id="no ramp"),
        pytest.param({"beta_slow": 40}, "beta_fast is 32, not above its beta_slow, 40", id="ramp upside down"),
        pytest.param({"beta_fast": math.nan}, "beta_fast is nan", id="NaN turns"),
        pytest.param(
            {"original_max_position_embeddings": 0.5}, "original_max_position_embeddings is 0", id="no context"
        ),
        pytest.param({"attention_factor": 0.0}, "attention_factor is 0", id="no attention"),
        pytest.param({"attention_factor": 1e30}, r"attention_factor is 1e\+30", id="huge attention"),
        pytest.param({"mscale": -100.0, "mscale_all_dim": 1.0}, "attention_factor is -", id="negative scale"),
        pytest.param({"mscale": math.nan, "mscale_all_dim": 1.0}, "attention_factor is nan", id="NaN scale"),
        pytest.param(
            {"rope_type": "dynamic"}, "scaled by dynamic; supported are linear, llama3, yarn and none", id="dynamic"
        ),
        pytest.param({"rope_type": "longrope"}, "scaled by longrope", id="longrope"),
        pytest.param({"rope_type": "linear", "factor": 0}, "factor is 0", id="linear by nothing"),
        pytest.param(
            {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "not above",
            id="llama3 of one step",
        ),
    ],
)
def test_a_number_that_nothing_can_be_stretched_by_is_refused_with_its_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Rope.of(YARN | change)

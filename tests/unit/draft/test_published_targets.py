"""Targets of every family that servers run can be described and read, and drafts for them trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import families
from tests.support.published_targets import HIDDEN, LAYERS, TARGETS, VOCAB, PublishedTarget, make
from transformers import AutoConfig

from updraft_artifacts.model_folder import describe, quantization, target_fingerprint
from updraft_artifacts.target_description import TORCH_ARCHITECTURES, TargetDescription
from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_draft.config import DraftConfig
from updraft_draft.target_weights import read_head
from updraft_draft.tensors import EncodedRows
from updraft_inference.torch_engine.model.config import ARCHITECTURES, TargetConfig
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import LastHidden, TopK
from updraft_trainer.learning.learner import Hyperparameters, Learner

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(params=list(TARGETS))
def published(request: pytest.FixtureRequest) -> tuple[str, PublishedTarget]:
    return request.param, TARGETS[request.param]


def changed(folder: Path, **values: Any) -> None:
    """Replace keys of config.json; None removes one."""
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: one for key, one in content.items() if one is not None}))


def test_a_target_is_described_by_its_config_and_index(published: tuple[str, PublishedTarget], tmp_path: Path) -> None:
    name, target = published
    make(name, tmp_path)
    found = describe(tmp_path)
    assert (found.hidden_size, found.vocab_size, found.num_layers) == (HIDDEN, VOCAB, LAYERS)
    assert found.aux_layers == (2, 4, 5)
    assert (found.norm_offset, found.logit_scale) == (target.norm_offset, target.logit_scale)
    assert (found.rope.theta, found.rope.kind) == (target.theta, target.scaling)
    places = found.places
    assert (places.embedding.name, places.head and places.head.name, places.final_norm.name) == (
        target.names[0],
        target.names[1] or None,
        target.names[2],
    )
    shape = found.draft_shape
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == target.shape


def test_the_three_tensors_are_read_as_the_target_uses_them(
    published: tuple[str, PublishedTarget], tmp_path: Path
) -> None:
    name, target = published
    tensors = make(name, tmp_path)
    head, (embedding, unembedding, norm) = read_head(tmp_path), target.names
    assert torch.equal(head.embedding, tensors[embedding])
    assert torch.equal(head.head, tensors[unembedding or embedding])
    assert torch.equal(head.final_norm.float(), tensors[norm].float() + target.norm_offset)


def test_a_draft_for_it_takes_a_training_step_and_its_config_is_read_again(
    published: tuple[str, PublishedTarget], tmp_path: Path
) -> None:
    make(published[0], tmp_path)
    head = read_head(tmp_path)
    config, tokens = head.draft(draft_vocab_size=64), torch.arange(64)
    assert DraftConfig.from_dict(json.loads(config.to_json())) == config
    learner = Learner(head, config, tokens, Hyperparameters())
    rows, generator = 12, torch.Generator().manual_seed(1)
    states = torch.randn(rows, HIDDEN, generator=generator).bfloat16()
    ids = torch.randint(64, (rows + 1,), generator=generator)
    top_k = TopK(ids[1:, None], torch.full((rows, 1), -0.1))
    for teacher in (LastHidden(states), top_k):
        sample = Sample(
            trace_id="t",
            aux=EncodedRows.of(torch.randn(rows, config.aux_size, generator=generator).bfloat16()),
            teacher=teacher,
            ids=ids,
            first_output=3,
            corrections=torch.zeros(rows + 1, dtype=torch.bool),
            is_evaluation=False,
            domain="",
            finished_unix_ms=0,
        )
        report = learner.train([sample])
        assert report.num_rows
        assert not report.is_skipped


@pytest.mark.parametrize("name", [name for name in TARGETS if "nobody" not in name and name != "inkling"])
def test_transformers_reads_the_same_sizes_in_these_configs(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    ours, content = describe(tmp_path), dict(TARGETS[name].config)
    content.pop("quantization_config", None)
    theirs = AutoConfig.for_model(content.pop("model_type"), **content).get_text_config()
    eps = getattr(theirs, "rms_norm_eps", None) or theirs.layer_norm_epsilon
    sizes = (theirs.hidden_size, theirs.vocab_size, theirs.num_hidden_layers, theirs.max_position_embeddings, eps)
    assert sizes == (ours.hidden_size, ours.vocab_size, ours.num_layers, ours.max_position, ours.norm_eps)


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_a_description_agrees_with_the_engine_that_runs_the_model(name: str, tmp_path: Path) -> None:
    families.make(name, tmp_path)
    engine, ours = TargetConfig.from_folder(tmp_path), describe(tmp_path)
    assert ours.engine == "torch"
    shape = ours.draft_shape
    assert (engine.hidden_size, engine.vocab_size, engine.num_layers, engine.max_position) == (
        ours.hidden_size,
        ours.vocab_size,
        ours.num_layers,
        ours.max_position,
    )
    assert (engine.num_heads, engine.num_kv_heads, engine.head_dim, engine.intermediate_size) == (
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.intermediate_size,
    )
    assert (
        engine.rope,
        engine.rms_norm_eps,
        engine.is_tied,
        engine.norm_offset,
        engine.eos_token_ids,
    ) == (
        ours.rope,
        ours.norm_eps,
        ours.is_tied,
        ours.norm_offset,
        ours.eos_token_ids,
    )


@pytest.mark.parametrize(("name", "head_dim"), [("qwen3", 128), ("gemma3", 256)])
def test_engine_and_description_take_the_heads_that_a_config_leaves_out_from_the_same_family(
    name: str, head_dim: int, tmp_path: Path
) -> None:
    families.make(name, tmp_path)
    changed(tmp_path, head_dim=None)
    assert describe(tmp_path).draft_shape.head_dim == TargetConfig.from_folder(tmp_path).head_dim == head_dim


def test_a_model_is_for_the_torch_engine_if_that_has_its_architecture_and_its_weights_are_not_quantised(
    tmp_path: Path,
) -> None:
    assert tuple(ARCHITECTURES) == TORCH_ARCHITECTURES
    families.make("llama", tmp_path)
    changed(tmp_path, quantization_config={"quant_method": "fp8"})
    assert describe(tmp_path).engine == "sglang"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek V3, FP8", "fp8"),
        ("gpt-oss, MXFP4", "mxfp4"),
        ("qwen 3 MoE, NVFP4", "modelopt/NVFP4"),
        ("kimi K2.5, INT4", "compressed-tensors/pack-quantized"),
        ("qwen 3.5 MoE", ""),
    ],
)
def test_a_description_says_how_the_weights_are_quantized(name: str, expected: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    assert quantization(tmp_path) == expected


def test_a_scaled_rope_is_stated_in_both_spellings(tmp_path: Path) -> None:
    make("deepseek V3, FP8", tmp_path)
    content = json.loads(read_head(tmp_path).draft(draft_vocab_size=64).to_json())
    assert content["rope_parameters"] == {"rope_theta": content["rope_theta"], **content["rope_scaling"]}
    assert content["rope_parameters"]["rope_type"] == "yarn"


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.logit_scale != 1])
def test_a_scale_of_the_logits_is_in_the_teacher_and_in_a_new_draft(name: str, tmp_path: Path) -> None:
    tensors = make(name, tmp_path)
    embedding, unembedding, _ = TARGETS[name].names
    expected = tensors[unembedding or embedding].float() * TARGETS[name].logit_scale
    head = read_head(tmp_path)
    learner = Learner(head, head.draft(draft_vocab_size=64), torch.arange(64), Hyperparameters())
    assert torch.equal(learner.network.lm_head.weight, expected[:64])
    states = 30 * torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    log_p = LastHidden(states).log_p(learner._vocabulary)
    torch.testing.assert_close(log_p, (states.float() @ expected[:64].T).log_softmax(-1), rtol=2e-2, atol=0.5)
    learner._change_vocabulary(torch.arange(1, 65))
    assert torch.equal(learner.network.lm_head.weight, expected[1:65])


def test_a_soft_cap_bounds_what_the_teacher_says(tmp_path: Path) -> None:
    make("gemma 4", tmp_path)
    head = read_head(tmp_path)
    learner = Learner(head, head.draft(draft_vocab_size=64), torch.arange(64), Hyperparameters())
    states = 100 * torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    logits = (states @ head.head[:64].T).float()
    expected = (30 * torch.tanh(logits / 30)).log_softmax(-1)
    torch.testing.assert_close(LastHidden(states).log_p(learner._vocabulary), expected, rtol=1e-2, atol=1e-2)
    assert logits.max() > 100


def test_rows_beyond_the_vocabulary_are_padding(tmp_path: Path) -> None:
    tensors = make("GLM 4.5", tmp_path)
    changed(tmp_path, vocab_size=300)
    head = read_head(tmp_path)
    assert torch.equal(head.embedding, tensors["model.embed_tokens.weight"][:300])
    assert torch.equal(head.head, tensors["lm_head.weight"][:300])


def test_a_head_that_no_one_mentions_is_used_if_it_is_there_and_tied_if_not(tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)
    assert not describe(tmp_path).is_tied
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert describe(tmp_path).is_tied
    changed(tmp_path, tie_word_embeddings=False)
    with pytest.raises(InvalidInput, match=r"its weights lack the head \(lm_head.weight, .*below any prefix"):
        describe(tmp_path)


@pytest.mark.parametrize("packed", ["lm_head.qweight", "lm_head.weight_packed", "model.output.weight_scale"])
def test_a_quantised_head_is_not_taken_for_a_tied_one(packed: str, tmp_path: Path) -> None:
    make("GLM 4.5", tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    index["weight_map"] |= {packed: SHARD}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match=f"its head is stored as {packed}; supported is a tensor of BF16, F16"):
        describe(tmp_path)
    changed(tmp_path, tie_word_embeddings=True)
    assert describe(tmp_path).is_tied


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: changed(folder, **values)


def _index(name: str, file: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        files = index["weight_map"] | {name: file}
        index["weight_map"] = {key: one for key, one in files.items() if one is not None}
        (folder / INDEX).write_text(json.dumps(index))

    return change


def _tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file(load_file(folder / SHARD) | {name: tensor}, folder / SHARD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(_config(hidden_size=None), "config.json lacks hidden_size", id="no width"),
        pytest.param(_config(num_hidden_layers=None), "config.json lacks num_hidden_layers", id="no layers"),
        pytest.param(_config(vocab_size=-1), "its vocab_size is -1, expected 1 to", id="no tokens"),
        pytest.param(_config(hidden_size=10**30), r"its hidden_size is 10+, expected 1 to 16,777,216", id="too wide"),
        pytest.param(_config(hidden_size="wide"), "its hidden_size is 'wide'", id="a word"),
        pytest.param(_config(hidden_size=True), "its hidden_size is True", id="a truth"),
        pytest.param(_config(num_hidden_layers=6), "its num_hidden_layers is 6, expected 7 to 1,024", id="too flat"),
        pytest.param(_config(num_key_value_heads=3), "4 heads do not divide into 3 key-value heads", id="heads"),
        pytest.param(_config(head_dim=33), "its head_dim is 33", id="odd heads"),
        pytest.param(
            _config(rms_norm_eps=2.0), r"its rms_norm_eps is 2\.0, not above 0 and at most 0\.1", id="a norm of nothing"
        ),
        pytest.param(_config(final_logit_softcapping=-3), "its final_logit_softcapping is -3", id="a cap below zero"),
        pytest.param(
            _config(logit_scale=1e308), r"its logits are scaled by 1e\+308, expected 0.0001 to 10000", id="hot"
        ),
        pytest.param(_config(logit_scale=1e308, logits_scaling=1e-308), "its logits are scaled by inf", id="hotter"),
        pytest.param(_config(logit_scale=1e-308, logits_scaling=1e308), "its logits are scaled by 0", id="cold"),
        pytest.param(_config(dim_model_base=0), "its dim_model_base is 0", id="a small model of nothing"),
        pytest.param(_config(rms_norm_eps="x"), "its rms_norm_eps is 'x'", id="a norm of words"),
        pytest.param(_config(rope_theta="x"), "bad value: rope_theta is 'x'", id="a base of words"),
        pytest.param(_config(rope_scaling="x"), "bad value: rope_scaling is 'x'", id="a scaling of words"),
        pytest.param(_config(rope_parameters=["x"]), r"bad value: rope_parameters is \['x'\]", id="a list of rope"),
        pytest.param(
            _config(rope_parameters={"type": "linear", "factor": []}),
            r"bad value: factor is \[\]",
            id="a rope by nothing",
        ),
        pytest.param(_config(eos_token_id=["x"]), r"bad value: eos_token_id is \['x'\]", id="an end of words"),
        pytest.param(_config(eos_token_id={"a": 1}), "bad value: eos_token_id is {'a': 1}", id="an end of names"),
        pytest.param(
            _config(hidden_size=64), r"embed_tokens.weight has shape \[320, 128\], .* \[320, 64\]", id="another width"
        ),
        pytest.param(_config(vocab_size=321), r"embed_tokens.weight has shape \[320, 128\]", id="more tokens"),
        pytest.param(
            _index("model.embed_tokens.weight", None), r"lack the embedding \(embed_tokens.weight, ", id="no embedding"
        ),
        pytest.param(_index("model.norm.weight", None), r"lack the final norm \(norm.weight, norm_f", id="no norm"),
        pytest.param(
            _index("model.layers.1.norm.weight", "model-7.safetensors"),
            r"lacks model-7.safetensors, which model.safetensors.index.json names",
            id="missing shard",
        ),
        pytest.param(
            _index("other.lm_head.weight", SHARD), "several tensors that may be meant by lm_head.weight", id="two heads"
        ),
        pytest.param(
            _index("lm_head.weight", "model-00001-of-00002.safetensors"),
            "model-00001-of-00002.safetensors lacks lm_head.weight, which .*index.json says it holds",
            id="another shard",
        ),
        pytest.param(
            _tensor("lm_head.weight", torch.zeros(VOCAB + 8, HIDDEN)),
            "its embedding has 320 tokens and its head 328",
            id="two vocabularies",
        ),
        pytest.param(
            _tensor("lm_head.weight", torch.zeros(VOCAB, HIDDEN).to(torch.float8_e4m3fn)),
            "lm_head.weight is F8_E4M3; supported are BF16, F16, F32",
            id="a quantised head",
        ),
        pytest.param(
            _tensor("model.norm.weight", torch.zeros(HIDDEN, 1)), r"norm.weight has shape \[128, 1\]", id="its norm"
        ),
        pytest.param(lambda folder: (folder / INDEX).write_text("[]"), "holds no JSON object", id="index of nothing"),
        pytest.param(lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map", id="empty index"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), "/config.json is not JSON", id="half"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), "config.json does not exist", id="no config"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    make("GLM 4.5", tmp_path)
    change(tmp_path)
    with pytest.raises(InvalidInput, match=words):
        describe(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, 2000])
def test_a_truncated_shard_is_refused_with_its_name(tmp_path: Path, size: int) -> None:
    make("GLM 4.5", tmp_path)
    whole = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(whole[:size])
    with pytest.raises(Corrupt, match=rf"{SHARD} of .* is truncated or damaged: it has {size} bytes"):
        describe(tmp_path)


def test_an_unknown_family_whose_layers_nobody_counts_is_refused_with_what_is_missing() -> None:
    with pytest.raises(InvalidInput, match=r"the embedding \(.*\) and the final norm \(.*\), below any prefix"):
        TargetDescription.of({"model_type": "novel"}, {"model.layers.0.norm.weight": "model.safetensors"})


def test_checkpoints_that_differ_in_one_layer_are_different_targets(tmp_path: Path) -> None:
    families.make("llama", tmp_path)
    before = target_fingerprint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert target_fingerprint(tmp_path) == before
    tensors |= {name: tensor + 1 for name, tensor in tensors.items() if name.startswith("model.layers.7.")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert target_fingerprint(tmp_path) != before

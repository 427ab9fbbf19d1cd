"""Drafts in the layouts that others publish compute after their import what they computed before."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.support import families
from tests.support.published_drafts import (
    DRAFT_VOCAB,
    HIDDEN,
    LAYER,
    SPECFORGE,
    SPECULATORS,
    TOKENS,
    VOCAB,
    Reference,
    Tensors,
    write,
)
from torch import Tensor

from updraft_artifacts.digests import tensors_digest
from updraft_artifacts.model_folder import describe
from updraft_chassis.errors import InvalidInput
from updraft_cli.models import published
from updraft_draft import checkpoint
from updraft_draft.config import check_fits
from updraft_draft.target_weights import read_head
from updraft_inference.engine import DraftCheckpoint, Drafter, GenerationRequest, SamplingParams
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits

Change = Callable[[dict[str, Any], Tensors], None]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    families.make("llama, untied, wide heads", folder, shard_size="100KB")
    return folder


def imported(folder: Path, target: Path, scratch: Path) -> Path:
    scratch.mkdir(exist_ok=True)
    return published.ours(folder, target, scratch)


def embedding(target: Path) -> Tensor:
    return read_head(target).embedding.float()


@pytest.mark.parametrize("is_pickled", [False, True], ids=["safetensors", "torch.save"])
@pytest.mark.parametrize("has_embedding", [False, True], ids=["without embedding", "with the target's embedding"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("config", "layer"),
    [pytest.param(SPECFORGE, "midlayer.", id="specforge"), pytest.param(SPECULATORS, "layers.0.", id="speculators")],
)
def test_an_imported_drafts_logits_are_those_of_the_published_tensors(
    target: Path,
    tmp_path: Path,
    config: dict[str, Any],
    layer: str,
    dtype: torch.dtype,
    *,
    has_embedding: bool,
    is_pickled: bool,
) -> None:
    reference = Reference(norm_before_residual=bool(config.get("norm_before_residual")))
    tensors = reference.tensors(layer, dtype)
    if has_embedding:
        tensors |= {"embed_tokens.weight": embedding(target).to(dtype)}
    theirs = write(tmp_path / "theirs", config, tensors, is_pickled=is_pickled)
    folder = imported(theirs, target, tmp_path / "ours")
    draft_config, found = checkpoint.load(folder)
    assert check_fits(draft_config, describe(target)) is None
    network = checkpoint.build(draft_config, found, embedding(target))
    generator = torch.Generator().manual_seed(1)
    aux, ids = torch.randn(2, 9, 3 * HIDDEN, generator=generator), torch.randint(VOCAB, (2, 9), generator=generator)
    logits = network.logits(network.unroll(aux, ids, num_steps=1)[0])
    torch.testing.assert_close(logits, reference(embedding(target)[ids], aux), rtol=1e-4, atol=1e-4)
    assert torch.equal(network.token_ids, TOKENS)


def test_rows_of_an_embedding_beyond_the_vocabulary_are_padding(target: Path, tmp_path: Path) -> None:
    padded = torch.nn.functional.pad(embedding(target), (0, 0, 0, 3))
    tensors = Reference(norm_before_residual=False).tensors("midlayer.", torch.float32) | {
        "embed_tokens.weight": padded
    }
    folder = imported(write(tmp_path / "theirs", SPECFORGE, tensors), target, tmp_path / "ours")
    assert check_fits(checkpoint.load(folder)[0], describe(target)) is None
    tensors["embed_tokens.weight"][VOCAB - 1] += 1
    with pytest.raises(InvalidInput, match="its embedding is not the target's"):
        imported(write(tmp_path / "theirs", SPECFORGE, tensors), target, tmp_path / "ours")


async def test_the_engine_serves_an_imported_draft_and_says_what_it_says_without(target: Path, tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", SPECULATORS, Reference(norm_before_residual=True).tensors("layers.0."))
    folder = imported(theirs, target, tmp_path / "ours")
    _, tensors = checkpoint.load(folder)
    digest = tensors_digest(checkpoint.tensor_specs(sorted(tensors.items())))
    limits = Limits(num_slots=1, max_context=64, max_lookahead=3)
    outputs = []
    async with TorchEngine.open(target, EngineOptions(limits=limits, dtype=torch.float32)) as engine:
        await engine.swap(DraftCheckpoint(version=1, folder=folder, tensors_digest=digest))
        for drafter in (Drafter.NONE, Drafter.EAGLE3):
            request = GenerationRequest(
                request_id=drafter,
                prompt_ids=(5, 6, 7, 8),
                max_tokens=40,
                sampling=SamplingParams(temperature=0),
                ignore_eos=True,
                drafter=drafter,
                lookahead=3,
            )
            (finished,) = [delta.finished async for delta in engine.generate(request) if delta.finished]
            outputs.append(finished.output_ids)
            assert any(step.draft_version == 1 for step in finished.steps) == (drafter is Drafter.EAGLE3)
    assert outputs[0] == outputs[1]


def test_a_draft_over_all_tokens_needs_no_vocabulary_of_its_own(target: Path, tmp_path: Path) -> None:
    tensors = Reference(norm_before_residual=False).tensors("midlayer.")
    del tensors["d2t"], tensors["t2d"]
    tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN).bfloat16()
    folder = write(tmp_path / "theirs", SPECFORGE | {"draft_vocab_size": None}, tensors)
    config, found = checkpoint.load(imported(folder, target, tmp_path / "ours"))
    assert config.draft_vocab_size == VOCAB
    assert found["d2t"].tolist() == [0] * VOCAB
    assert found["t2d"].all()


def test_what_speculators_learns_with_is_left_behind(target: Path, tmp_path: Path) -> None:
    tensors = Reference(norm_before_residual=True).tensors("layers.0.")
    plain = imported(write(tmp_path / "plain", SPECULATORS, tensors), target, tmp_path / "a")
    tensors |= {"verifier_norm.weight": torch.ones(HIDDEN), "verifier_lm_head.weight": torch.ones(DRAFT_VOCAB, HIDDEN)}
    more = imported(write(tmp_path / "more", SPECULATORS, tensors), target, tmp_path / "b")
    assert (plain / "model.safetensors").read_bytes() == (more / "model.safetensors").read_bytes()


def test_yarn_that_names_no_original_context_is_stretched_from_the_drafts_own(target: Path, tmp_path: Path) -> None:
    """The positions that the import writes are the target's."""
    tensors = Reference(norm_before_residual=False).tensors("midlayer.")
    config = SPECFORGE | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    ours, _ = checkpoint.load(imported(write(tmp_path / "theirs", config, tensors), target, tmp_path / "ours"))
    assert (ours.rope.kind, ours.rope.original_max_position, ours.max_position) == ("yarn", 32, 512)


def test_a_folder_of_ours_is_taken_as_it_is(target: Path, tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", SPECFORGE, Reference(norm_before_residual=False).tensors("midlayer."))
    ours = imported(theirs, target, tmp_path / "ours")
    assert published.ours(ours, None, tmp_path / "again") == ours


def _config(**values: Any) -> Change:
    return lambda config, _: config.update(values)


def _layer_config(**values: Any) -> Change:
    return lambda config, _: config.update(transformer_layer_config=LAYER | values)


def _tensor(name: str, tensor: Tensor) -> Change:
    return lambda _, tensors: tensors.update({name: tensor})


def _without(name: str) -> Change:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        (config if name in config else tensors).pop(name)

    return change


LAST_NAN = torch.full((HIDDEN,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)

_WRONG: list[Any] = [
    pytest.param(SPECFORGE, _config(num_hidden_layers=2), "it has 2 layers, and only 1", id="layers"),
    pytest.param(SPECFORGE, _config(vocab_size=600), "its vocabulary is 600, the target's is 512", id="vocabulary"),
    pytest.param(SPECFORGE, _config(hidden_size=128), "its hidden size is 128, the target's is 64", id="hidden size"),
    pytest.param(SPECFORGE, _config(target_hidden_size=32), "its target hidden size is 32", id="target hidden size"),
    pytest.param(SPECFORGE, _config(intermediate_size=96), r"mlp\.\w+_proj\.weight has shape .*says", id="shape"),
    pytest.param(SPECFORGE, _config(fc_norm=True), "has fc_norm, which is not supported", id="EAGLE 3.1"),
    pytest.param(SPECFORGE, _config(attention_bias=True), "has attention_bias", id="biases"),
    pytest.param(SPECFORGE, _config(hidden_act="gelu"), "its activation is gelu", id="activation"),
    pytest.param(SPECFORGE, _config(rope_scaling={"type": "dynamic"}), "is scaled by dynamic", id="rope"),
    pytest.param(SPECFORGE, _config(rope_scaling={"type": "yarn"}), "lacks 'factor'", id="yarn without its factor"),
    pytest.param(
        SPECFORGE,
        _config(rope_scaling={"type": "yarn", "factor": math.nan}),
        "factor is nan, not",
        id="yarn by no number",
    ),
    pytest.param(
        SPECFORGE,
        _config(eagle_config={"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}),
        r"reads the inputs of layers \[3, 5, 6\], and engines here show it those of \[2, 4, 5\]",
        id="auxiliary layers",
    ),
    pytest.param(SPECFORGE, _config(eagle_config={"use_aux_hidden_state": False}), "no auxiliary", id="EAGLE 2"),
    pytest.param(SPECFORGE, _without("rms_norm_eps"), "lacks 'rms_norm_eps'", id="size missing"),
    pytest.param(SPECFORGE, _config(num_attention_heads=None), "num_attention_heads is None", id="no number"),
    pytest.param(SPECFORGE, _config(rms_norm_eps=math.nan), "its rms_norm_eps is nan", id="a norm by no number"),
    pytest.param(SPECFORGE, _config(rms_norm_eps="x"), "has a bad value: .*'x'", id="a word"),
    pytest.param(SPECFORGE, _tensor("norm.weight", torch.full((HIDDEN,), math.nan)), "not finite", id="no numbers"),
    pytest.param(SPECFORGE, _tensor("norm.weight", LAST_NAN), "not finite", id="a NaN that rounds to 0"),
    pytest.param(SPECFORGE, _tensor("norm.weight", torch.full((HIDDEN,), 3.4e38)), "not finite", id="beyond bfloat16"),
    pytest.param(SPECFORGE, _without("d2t"), "lacks d2t, which says what its 100 tokens of 512", id="no d2t"),
    pytest.param(SPECFORGE, _without("lm_head.weight"), r"lacks the tensors \['lm_head.weight'\]", id="no head"),
    pytest.param(
        SPECFORGE, _tensor("midlayer.self_attn.q_norm.weight", torch.ones(24)), "q_norm.*not known", id="unknown tensor"
    ),
    pytest.param(SPECFORGE, _tensor("norm.weight", torch.ones(HIDDEN).to(torch.int8)), "is I8", id="integers"),
    pytest.param(SPECFORGE, _tensor("d2t", torch.arange(DRAFT_VOCAB) + 412), "does not map", id="tokens outside"),
    pytest.param(SPECFORGE, _tensor("d2t", -torch.arange(DRAFT_VOCAB)), "does not map", id="one token twice"),
    pytest.param(SPECFORGE, _tensor("t2d", torch.ones(VOCAB, dtype=torch.bool)), "disagree", id="t2d of others"),
    pytest.param(
        SPECFORGE, _tensor("embed_tokens.weight", torch.ones(VOCAB, HIDDEN)), "is not the target's", id="embedding"
    ),
    pytest.param(
        SPECFORGE, _tensor("embed_tokens.weight", torch.ones(9, HIDDEN)), r"has shape \[9, 64\]", id="its shape"
    ),
    pytest.param(SPECULATORS, _config(speculators_model_type="dflash"), "is a dflash speculator", id="kind"),
    pytest.param(SPECULATORS, _config(norm_before_fc=True), "has norm_before_fc", id="another input"),
    pytest.param(SPECULATORS, _without("norm_before_residual"), "does not say norm_before_residual", id="not said"),
    pytest.param(SPECULATORS, _config(eagle_aux_hidden_state_layer_ids=[1, 3, 4]), r"\[1, 3, 4\]", id="its layers"),
    pytest.param(SPECULATORS, _layer_config(num_hidden_layers=3), "it has 3 layers", id="its depth"),
    pytest.param(SPECULATORS, _without("transformer_layer_config"), "lacks 'transformer_layer_config'", id="sizes"),
]


@pytest.mark.parametrize(("config", "change", "words"), _WRONG)
def test_a_draft_that_does_not_fit_is_refused_with_the_reason(
    target: Path, tmp_path: Path, config: dict[str, Any], change: Change, words: str
) -> None:
    layer = "midlayer." if config is SPECFORGE else "layers.0."
    changed, tensors = dict(config), Reference(norm_before_residual=False).tensors(layer)
    change(changed, tensors)
    folder = write(tmp_path / "theirs", changed, tensors)
    with pytest.raises(InvalidInput, match=rf"theirs cannot be imported: .*{words}"):
        imported(folder, target, tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_config(vocab_size=600), "its vocabulary is 600, the target's is 512"),
        (_config(hidden_size=128), "its hidden size is 128"),
        (_config(updraft={"aux_layers": [1, 2, 3]}), r"reads layers \[1, 2, 3\], engines show \[2, 4, 5\]"),
        (_config(intermediate_size=96), "has shape"),
        (_config(rms_norm_eps=math.nan), "its rms_norm_eps is nan"),
        (_config(num_attention_heads="x"), "is damaged"),
    ],
)
def test_a_draft_of_ours_that_does_not_fit_its_target_is_refused_too(
    target: Path, tmp_path: Path, change: Change, words: str
) -> None:
    theirs = write(tmp_path / "theirs", SPECFORGE, Reference(norm_before_residual=False).tensors("midlayer."))
    ours = imported(theirs, target, tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    assert published.ours(ours, target, tmp_path / "again") == ours
    change(config, {})
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=words):
        published.ours(ours, target, tmp_path / "again")


def test_a_draft_of_others_without_its_target_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", SPECFORGE, {"d2t": torch.zeros(1)})
    with pytest.raises(InvalidInput, match="name the folder of its target with --target"):
        published.ours(folder, None, tmp_path)


def test_the_rewritten_file_is_one_that_safetensors_reads(target: Path, tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", SPECFORGE, Reference(norm_before_residual=False).tensors("midlayer."))
    before = load_file(theirs / "model.safetensors")
    after = load_file(imported(theirs, target, tmp_path / "ours") / "model.safetensors")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in after.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in before.items()
    }

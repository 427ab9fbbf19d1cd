"""Each family's forward is that of transformers, whatever shares the batch and however long ago it began."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import families
from tests.support.families import FAMILIES, VOCAB, WINDOW
from tests.support.tiny_target import make_draft, make_tiny_target, save_draft
from torch import Tensor
from transformers import PreTrainedModel

from updraft_artifacts.target_description import default_aux_layers
from updraft_chassis.errors import Corrupt, InvalidInput
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import read_head
from updraft_inference.engine import DraftCheckpoint, Drafter, GenerationRequest, SamplingParams
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.config import TargetConfig
from updraft_inference.torch_engine.model.kv_cache import CacheShape, SlotCache
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.model.target import Target
from updraft_kernels.loader import Kernels

TEXTS = [random.Random(length).sample(range(3, VOCAB), length) for length in (WINDOW - 3, 30, 57)]
"""Shorter than the sliding window, several times as long, and longer than the original context of yarn."""

NUM_STEPS, WIDTH, CHUNK = 2, 4, 20
"""Forwards of all rows together, tokens of each row in one, and the most of a prompt in one."""


@pytest.fixture(params=list(FAMILIES), scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("family")
    return folder, families.make(request.param, folder)


def opened(folder: Path, library: Kernels | None = None) -> Target:
    return Target.open(folder, dtype=torch.float32, device=torch.device("cpu"), library=library)


def test_a_model_that_knows_a_million_positions_costs_no_more_than_those_that_are_used(tmp_path: Path) -> None:
    """Each engine would hold gigabytes of rotary tables otherwise, and its draft as many."""
    make_tiny_target(tmp_path)
    known = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**known, "max_position_embeddings": 2**40}))
    limits = Limits(num_slots=1, max_context=64, max_lookahead=3)

    TorchEngine.open(tmp_path, EngineOptions(limits=limits, dtype=torch.float32))
    config = read_head(tmp_path).draft(draft_vocab_size=16)
    DraftNetwork(config, torch.zeros(VOCAB, config.hidden_size), torch.arange(16), num_positions=limits.num_positions)


def new_cache(target: Target, *, num_slots: int) -> SlotCache:
    c = target.config
    shape = CacheShape(
        num_layers=c.num_layers,
        num_slots=num_slots,
        num_positions=80,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
    )
    return SlotCache(shape, like=target.embedding)


def run(target: Target, cache: SlotCache, slots: list[int], starts: list[int], ids: list[list[int]]) -> Any:
    flat = torch.tensor([token for row in ids for token in row])
    return target.forward(flat, [cache.batch(slots, starts, [len(row) for row in ids])], cache)


def states(model: PreTrainedModel, text: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the inputs of the auxiliary layers, and the last state after the final norm."""
    with torch.no_grad():
        out = model(torch.tensor([text]), output_hidden_states=True)
    layers = default_aux_layers(model.config.num_hidden_layers)
    return out.logits[0], torch.cat([out.hidden_states[i][0] for i in layers], -1), out.hidden_states[-1][0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def test_every_row_of_prompts_and_decode_steps_is_that_of_transformers(
    family: tuple[Path, PreTrainedModel], library: Kernels | None
) -> None:
    folder, model = family
    target = opened(folder, library)
    cache = new_cache(target, num_slots=5)
    slots = [0, 2, 4]  # not dense: keys are gathered
    expected = [states(model, text) for text in TEXTS]
    prompts = [len(text) - NUM_STEPS * WIDTH for text in TEXTS]
    for slot, text, length, (logits, aux, last) in zip(slots, TEXTS, prompts, expected, strict=True):
        for begin in range(0, length, CHUNK):
            end = min(begin + CHUNK, length)
            forward = run(target, cache, [slot], [begin], [text[begin:end]])
            assert_close(forward.aux, aux[begin:end])
            assert_close(forward.last, last[begin:end])
            assert_close(target.logits(forward.last), logits[begin:end])
    for step in range(NUM_STEPS):
        starts = [length + step * WIDTH for length in prompts]
        widths = [WIDTH - (i + step) % 2 for i in range(len(slots))]  # what is rejected is read again
        rows = [text[start : start + width] for text, start, width in zip(TEXTS, starts, widths, strict=True)]
        forward = run(target, cache, slots, starts, rows)
        first = 0
        for start, width, (logits, aux, _) in zip(starts, widths, expected, strict=True):
            assert_close(forward.aux[first : first + width], aux[start : start + width])
            assert_close(target.logits(forward.last[first : first + width]), logits[start : start + width])
            first += width
        for slot, start, text in zip(slots, starts, TEXTS, strict=True):
            run(target, cache, [slot], [start], [text[start : start + WIDTH]])


def test_a_prompt_that_is_read_beside_decode_steps_changes_no_row(
    family: tuple[Path, PreTrainedModel], library: Kernels | None
) -> None:
    folder, model = family
    target = opened(folder, library)
    cache = new_cache(target, num_slots=3)
    expected = [states(model, text) for text in TEXTS]
    starts = [len(text) - 3 for text in TEXTS[:2]]
    run(target, cache, [0, 1], [0, 0], [text[:start] for text, start in zip(TEXTS, starts, strict=False)])
    half = len(TEXTS[2]) // 2
    run(target, cache, [2], [0], [TEXTS[2][:half]])

    rows = [TEXTS[0][starts[0] : starts[0] + 1], TEXTS[1][starts[1] : starts[1] + 3], TEXTS[2][half:]]
    batches = [cache.batch([0, 1], starts, [1, 3]), cache.batch([2], [half], [len(rows[2])])]
    forward = target.forward(torch.tensor([token for row in rows for token in row]), batches, cache)
    first = 0
    for row, start, (logits, aux, _) in zip(rows, [*starts, half], expected, strict=True):
        end = first + len(row)
        assert_close(forward.aux[first:end], aux[start : start + len(row)])
        assert_close(target.logits(forward.last[first:end]), logits[start : start + len(row)])
        first = end


@pytest.mark.parametrize("name", ["mistral, sliding", "mistral, sliding, odd heads"])
def test_a_sequence_that_grows_by_one_token_crosses_the_window_exactly(
    tmp_path: Path, library: Kernels | None, name: str
) -> None:
    model = families.make(name, tmp_path)
    target, text = opened(tmp_path, library), TEXTS[1]
    cache = new_cache(target, num_slots=1)
    expected = states(model, text)[0]
    for position, token in enumerate(text):
        forward = run(target, cache, [0], [position], [[token]])
        assert_close(target.logits(forward.last)[0], expected[position])


async def test_greedy_output_of_the_engine_is_that_of_transformers_generate(
    family: tuple[Path, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = family[0]
    model: Any = family[1]  # mypy knows no `generate` of it
    limits = Limits(num_slots=3, max_context=120, max_lookahead=4)
    expected = []
    for text in TEXTS:
        ids = torch.tensor([text])
        full = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        expected.append(tuple(full[0, len(text) :].tolist()))
    draft_folder = tmp_path_factory.mktemp("draft")
    draft = DraftCheckpoint(version=1, folder=draft_folder, tensors_digest=save_draft(make_draft(folder), draft_folder))
    async with TorchEngine.open(folder, EngineOptions(limits=limits, dtype=torch.float32)) as engine:
        await engine.swap(draft)
        for drafter in Drafter:
            actual = []
            for n, text in enumerate(TEXTS):
                wanted = GenerationRequest(
                    request_id=f"{drafter}-{n}",
                    prompt_ids=tuple(text),
                    max_tokens=20,
                    sampling=SamplingParams(temperature=0),
                    ignore_eos=True,
                    drafter=drafter,
                    lookahead=4,
                )
                deltas = [delta async for delta in engine.generate(wanted)]
                actual.append(tuple(token for delta in deltas for token in delta.token_ids))
            assert actual == expected


def test_the_head_that_the_trainer_reads_says_what_the_model_says(family: tuple[Path, PreTrainedModel]) -> None:
    folder, model = family
    head = read_head(folder)
    logits, _, last = states(model, TEXTS[1])
    assert_close(last @ head.head.T, logits)
    # The final norm as a plain one, which the draft's is: norm(x) * weight.
    with torch.no_grad():
        x = torch.randn(5, head.config.hidden_size, generator=torch.Generator().manual_seed(1))
        normed = model.get_submodule("model.norm")(x)
    plain = torch.nn.functional.rms_norm(x, x.shape[-1:], head.final_norm, head.config.norm_eps)
    assert_close(plain, normed)


def test_a_model_in_several_files_is_the_same_model(tmp_path: Path) -> None:
    model = families.make("qwen3", tmp_path, shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    target = opened(tmp_path)
    assert torch.equal(target.embedding, model.get_parameter("model.embed_tokens.weight"))
    identity = torch.eye(target.config.hidden_size)
    assert_close(target.logits(identity).T, model.get_parameter("lm_head.weight"))


def test_configs_from_before_transformers_5_say_the_same(tmp_path: Path) -> None:
    """As published: one theta and `rope_scaling`, or Gemma's `rope_local_base_freq` and pattern."""
    families.make("gemma3", tmp_path)
    new = TargetConfig.from_folder(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"], content["layer_types"]
    old = {"rope_theta": 50_000.0, "rope_local_base_freq": 500.0, "rope_scaling": None, "sliding_window_pattern": 3}
    (tmp_path / "config.json").write_text(json.dumps(content | old))
    assert TargetConfig.from_folder(tmp_path) == new
    scaled = old | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(content | scaled))
    config = TargetConfig.from_folder(tmp_path)
    assert (config.rope.kind, config.rope.factor, config.sliding_rope) == ("linear", 8.0, new.sliding_rope)


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            _set(architectures=["GPT2LMHeadModel"]),
            r"it is GPT2LMHeadModel; the torch engine runs Llama.*; serve it with engine sglang",
            id="family",
        ),
        pytest.param(_set(architectures=None), "an unnamed architecture", id="no architecture"),
        pytest.param(
            _set(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}),
            "scaled by dynamic; supported are linear, llama3, yarn and none",
            id="dynamic",
        ),
        pytest.param(
            _set(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 0}),
            r"cannot be served: the rotary embedding's factor is 0, not between",
            id="yarn by nothing",
        ),
        pytest.param(
            _set(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": "x"}),
            "has a bad value: factor is 'x'",
            id="yarn by a word",
        ),
        pytest.param(
            _set(rope_parameters=None, rope_scaling="x"), "bad value: rope_scaling is 'x'", id="a scaling of words"
        ),
        pytest.param(_set(rope_parameters="x"), "bad value: rope_parameters is 'x'", id="a rope of words"),
        pytest.param(_set(partial_rotary_factor=0.5), "partial_rotary_factor", id="a part of a head"),
        pytest.param(
            _set(mlp_bias=True),
            "mlp_bias, which the torch engine does not support; serve it with engine sglang",
            id="biases in the MLP",
        ),
        pytest.param(_set(quantization_config={"bits": 4}), "quantization_config", id="quantised"),
        pytest.param(_set(hidden_act="gelu"), "its activation is gelu; supported are silu", id="activation"),
        pytest.param(_set(hidden_size="wide"), "its hidden_size is 'wide', expected 1 to", id="no number"),
    ],
)
def test_what_the_engine_does_not_run_is_refused_with_the_reason(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    families.make("llama", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=words):
        TargetConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(_set(vocab_size=VOCAB + 1), r"embed_tokens\.weight has shape \[\d+, \d+\]", id="vocabulary"),
        pytest.param(_set(intermediate_size=2), r"layers\.0\.mlp\.gate_proj\.weight has shape", id="width of the MLP"),
        pytest.param(_set(num_key_value_heads=1), r"k_proj\.weight has shape .* config\.json requires", id="heads"),
        pytest.param(_set(num_key_value_heads=3), "do not divide into 3 key-value heads", id="groups of heads"),
        pytest.param(_set(head_dim=5), "its head_dim is 5", id="odd heads"),
        pytest.param(_set(num_hidden_layers=0), "its num_hidden_layers is 0, expected 1 to", id="no layers"),
        pytest.param(
            _set(num_attention_heads=0, head_dim=None),
            "its num_attention_heads is 0, expected 1 to",
            id="no heads",
        ),
        pytest.param(_set(num_hidden_layers=99), r"lacks the tensor 'model\.layers\.", id="more layers"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_with_both_sizes(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    families.make("llama", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=words):
        opened(tmp_path)


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(lambda whole: whole[: len(whole) // 2], id="half"),
        pytest.param(lambda whole: whole[:5000], id="not even its table"),
        pytest.param(lambda _: b"", id="nothing"),
        pytest.param(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n", id="pointer"),
    ],
)
def test_a_broken_download_is_told_with_its_file_and_size(tmp_path: Path, held: Callable[[bytes], bytes]) -> None:
    families.make("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(held(file.read_bytes()))
    with pytest.raises(Corrupt, match=rf"model\.safetensors \({file.stat().st_size} bytes\) is no whole safetensors"):
        opened(tmp_path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    families.make("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj\.weight is torch\.int8, and quantised"):
        opened(tmp_path)

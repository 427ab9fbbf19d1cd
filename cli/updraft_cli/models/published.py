"""EAGLE-3 drafts as others publish them, rewritten as the one layout that everything here reads.

Two layouts are known. EAGLE's own, which SpecForge, Aurora and most others keep: sizes in config.json, tensors of the layer
named `midlayer.*`. And that of vLLM's speculators: sizes in `transformer_layer_config`, tensors named `layers.0.*`. What
names and config become is decided by pure functions on them; then tensors are copied one by one, rounded to bfloat16 where
they are wider. Every tensor has to be known, and nothing is guessed: a draft that computes something else than ours would
serve, and be a bad one. Tensors are in a safetensors file, or in one of `torch.save`. No torch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from updraft_artifacts import model_files, model_folder, safetensors_header, transfer
from updraft_artifacts.rope import Rope
from updraft_artifacts.safetensors_header import TensorSpan
from updraft_artifacts.target_description import TargetDescription, checked_eps
from updraft_chassis.errors import InvalidInput
from updraft_cli.models import bfloat16, torch_file

OUR_KEY = "updraft"
"""The key that a config.json has if the draft is in our layout."""

_EMBEDDING = "embed_tokens.weight"
_OF_TRAINING = ("verifier_norm.weight", "verifier_lm_head.weight")
"""Copies of the target's, which speculators learns with."""

_OTHER_NETWORKS = (
    "attention_bias", "qkv_bias", "mlp_bias", "bias",
    "fc_norm", "norm_output", "norm_before_fc", "quantization_config",
)  # fmt: skip
"""Keys of config.json whose draft computes something else than ours."""

_SIZES = (
    "vocab_size", "draft_vocab_size", "hidden_size", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip

_BLOCK_VALUES = 4 * 1024 * 1024
_FLOATS = ("BF16", "F16", "F32")


def ours(folder: Path, model: Path | None, scratch: Path) -> Path:
    """Return `folder` if its draft is in our layout, else `scratch`, where it is then.

    `model` is the folder of the target. InvalidInput where the draft is not for it, or of no layout that is known.
    """
    content = model_folder.read_json(folder / transfer.CONFIG)
    weights = weights_of(folder)
    if OUR_KEY in content or (folder / transfer.MANIFEST).exists():
        if model is not None and weights is not None:
            _check_ours(content, weights, model_folder.describe(model))
        return folder
    if weights is None:
        return folder  # refused where it is read, by the files that are there
    if model is None:
        raise InvalidInput(
            f"{folder} is a draft of another trainer: name the folder of its target with --target, because it says which"
            " layers the draft reads, and whether the draft shares its embedding"
        )
    try:
        config = our_config(content, model_folder.describe(model))
        _rewrite(weights, config, model, scratch / transfer.WEIGHTS)
    except InvalidInput as error:
        raise InvalidInput(f"the draft in {folder} cannot be imported: {error}") from None
    (scratch / transfer.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return scratch


def check_engine(folder: Path, engine: Literal["torch", "sglang", "vllm"]) -> None:
    """Raise InvalidInput for a draft, in any layout, that no pod with this engine could ever load."""
    if engine != "torch" and model_folder.read_json(folder / transfer.CONFIG).get("norm_before_residual"):
        raise InvalidInput(
            "this draft has norm_before_residual, which Updraft cannot swap into an SGLang or vLLM server: serve it with engine"
            " torch, or choose another draft"
        )


def weights_of(folder: Path) -> Path | None:
    """Return the file that a draft's tensors are in, if there is one."""
    files = (folder / name for name in (transfer.WEIGHTS, torch_file.WEIGHTS))
    return next((file for file in files if file.is_file()), None)


def our_config(content: Mapping[str, Any], target: TargetDescription) -> dict[str, Any]:
    """Return our config.json of a published draft, for this target.

    InvalidInput for what our draft network does not compute, and where the two do not fit.
    """
    try:
        flat = _flat(content)
        _check_network(flat)
        _check_target(flat, target)
        aux_layers = _aux_layers(content, target.num_layers)
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            **{key: flat[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")},
            "draft_vocab_size": flat.get("draft_vocab_size") or flat["vocab_size"],
            "target_hidden_size": flat["hidden_size"],
            "num_hidden_layers": 1,
            "num_key_value_heads": flat.get("num_key_value_heads") or flat["num_attention_heads"],
            "head_dim": flat.get("head_dim") or flat["hidden_size"] // flat["num_attention_heads"],
            "hidden_act": "silu",
            "rms_norm_eps": checked_eps(float(flat["rms_norm_eps"])),
            **Rope.of_config(flat, theta=10_000.0).to_dict(),
            # Positions are computed, not learned; published configs state the training length here.
            "max_position_embeddings": target.max_position,
            **({"norm_before_residual": True} if flat.get("norm_before_residual") else {}),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": flat.get("bos_token_id", 1),
            "eos_token_id": flat.get("eos_token_id", 2),
            "dtype": "bfloat16",
            OUR_KEY: {"aux_layers": aux_layers},
        }
        _check_sizes(config)
    except KeyError as error:
        raise InvalidInput(f"a config.json lacks {error}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InvalidInput(f"a config.json has a bad value: {error}") from None
    return config


def _check_ours(config: Mapping[str, Any], weights: Path, target: TargetDescription) -> None:
    """Raise InvalidInput for a draft in our layout that is not for this target, or not what its config.json says."""
    try:
        _check_target(config, target)
        layers = config[OUR_KEY]["aux_layers"]
        _check_sizes(config)
        checked_eps(float(config["rms_norm_eps"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"the config.json of {weights.parent} is damaged: {error}") from None
    if layers != list(target.aux_layers):
        raise InvalidInput(
            f"the draft in {weights.parent} reads layers {layers}, engines show {list(target.aux_layers)}"
        )
    _check_tensors(_File.open(weights).places, our_shapes(config))


def our_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the float tensors of a draft in our layout."""
    hidden, intermediate, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer = {
        "self_attn.q_proj": (heads, 2 * hidden),
        "self_attn.k_proj": (kv_heads, 2 * hidden),
        "self_attn.v_proj": (kv_heads, 2 * hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "hidden_norm": (hidden,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"midlayer.{name}.weight": shape for name, shape in layer.items()} | {
        "fc.weight": (hidden, 3 * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
    }


def our_name(name: str) -> str:
    name = name.removeprefix("model.")
    return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name


def _is_speculators(content: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in content


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of the network in one dictionary, as in EAGLE's own layout."""
    if not _is_speculators(content):
        return dict(content)
    kind = content["speculators_model_type"]
    if kind != "eagle3":
        raise InvalidInput(f"it is a {kind} speculator, and only eagle3 is known")
    if "norm_before_residual" not in content:
        raise InvalidInput("its config.json does not say norm_before_residual, and engines differ in what that means")
    above = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "quantization_config")
    return dict(content["transformer_layer_config"]) | {key: content.get(key) for key in above}


def _check_network(flat: Mapping[str, Any]) -> None:
    num_layers = flat.get("num_hidden_layers", 1)
    if num_layers != 1:
        raise InvalidInput(f"it has {num_layers} layers, and only 1 is supported")
    if flat.get("hidden_act", "silu") != "silu":
        raise InvalidInput(f"its activation is {flat['hidden_act']}, and only silu is supported")
    for key in _OTHER_NETWORKS:
        if flat.get(key):
            raise InvalidInput(f"its config.json has {key}, which is not supported")


def _check_target(flat: Mapping[str, Any], target: TargetDescription) -> None:
    pairs = [
        ("vocabulary", flat["vocab_size"], target.vocab_size),
        ("hidden size", flat["hidden_size"], target.hidden_size),
        ("target hidden size", flat.get("target_hidden_size") or flat["hidden_size"], target.hidden_size),
    ]
    for what, have, want in pairs:
        if have != want:
            raise InvalidInput(f"its {what} is {have}, the target's is {want}")


def _check_sizes(config: Mapping[str, Any]) -> None:
    for key in _SIZES:
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{key} is {config[key]!r}")


def _aux_layers(content: Mapping[str, Any], num_layers: int) -> list[int]:
    """Return the target layers whose inputs the draft reads; engines provide exactly three."""
    shown = [2, num_layers // 2, num_layers - 3]
    eagle = content.get("eagle_config") or {}
    if not eagle.get("use_aux_hidden_state", True):
        raise InvalidInput("it reads no auxiliary states of its target")
    if _is_speculators(content):
        read = content.get("eagle_aux_hidden_state_layer_ids")
    else:  # SGLang's counting: a layer's output, which is the input of the next
        read = eagle.get("eagle_aux_hidden_state_layer_ids")
        read = read and [layer + 1 for layer in read]
    if read and list(read) != shown:
        raise InvalidInput(f"it reads the inputs of layers {list(read)}, and engines here show it those of {shown}")
    return shown


def _rewrite(source: Path, config: Mapping[str, Any], model: Path, destination: Path) -> None:
    file = _File.open(source)
    shapes = our_shapes(config)
    _check_tensors(file.places, shapes)
    if _EMBEDDING in file.places:
        _check_embedding(file, model)
    d2t, t2d = _vocabulary(file, config["draft_vocab_size"], config["vocab_size"])
    ends = [("d2t", "I64", d2t.shape), *((name, "BF16", shape) for name, shape in sorted(shapes.items()))]
    with destination.open("wb") as written:
        written.write(safetensors_header.header([*ends, ("t2d", "BOOL", t2d.shape)]))
        written.write(d2t.astype("<i8").data)
        for name in sorted(shapes):
            for block in file.blocks(name):
                rounded = bfloat16.bits(block)
                if not (np.isfinite(block).all() and bfloat16.are_finite(rounded)):
                    raise InvalidInput(f"{name} holds values that are not finite in bfloat16")
                written.write(rounded.data)
        written.write(t2d.data)


def _check_tensors(places: Mapping[str, TensorSpan], shapes: Mapping[str, tuple[int, ...]]) -> None:
    optional = {"d2t", "t2d", _EMBEDDING, *_OF_TRAINING}
    missing, unknown = sorted(set(shapes) - set(places)), sorted(set(places) - set(shapes) - optional)
    if missing or unknown:
        raise InvalidInput(f"it lacks the tensors {missing[:5]}, and has {unknown[:5]}, which are not known")
    for name, shape in shapes.items():
        place = places[name]
        if place.shape != shape:
            raise InvalidInput(f"{place.name} has shape {list(place.shape)}, its config.json says {list(shape)}")
        if place.dtype not in _FLOATS:
            raise InvalidInput(f"{place.name} is {place.dtype}; supported are {', '.join(_FLOATS)}")


def _check_embedding(file: "_File", model: Path) -> None:
    """Drop a draft's copy of the target's embedding, because engines share the target's; refuse a different one.

    Either may have more rows than the vocabulary, which are padding.
    """
    description, spans = model_files.examine(model_folder.FolderFiles(model))
    place = description.places.embedding
    theirs = _File.of(model / place.file, {_EMBEDDING: spans[place.name]})
    shapes, num_rows = [one.places[_EMBEDDING].shape for one in (file, theirs)], description.vocab_size
    if any(len(shape) != 2 or shape[0] < num_rows or shape[1] != description.hidden_size for shape in shapes):
        raise InvalidInput(f"its embedding has shape {list(shapes[0])}, the target's {list(shapes[1])}")
    own_blocks, shared_blocks = (one.blocks(_EMBEDDING, num_rows) for one in (file, theirs))
    for own, shared in zip(own_blocks, shared_blocks, strict=True):
        # As far apart as copies in float16 and bfloat16 may be.
        if not np.allclose(own, shared, rtol=2**-7, atol=1e-5):
            raise InvalidInput("its embedding is not the target's, which it would share here")


def _vocabulary(file: "_File", draft_vocab: int, vocab: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return d2t and t2d; without them a draft proposes every token."""
    d2t = np.zeros(draft_vocab, dtype=np.int64)
    if "d2t" in file.places:
        d2t = file.integers("d2t")
    elif draft_vocab != vocab:
        raise InvalidInput(f"it lacks d2t, which says what its {draft_vocab} tokens of {vocab} are")
    tokens = d2t + np.arange(len(d2t))
    is_sound = len(tokens) == draft_vocab and tokens[0] >= 0 and tokens[-1] < vocab
    if not is_sound or not (np.diff(tokens) > 0).all():
        raise InvalidInput("d2t does not map its tokens to distinct tokens of the target, in their order")
    t2d = np.zeros(vocab, dtype=np.bool_)
    t2d[tokens] = True
    if "t2d" in file.places and not np.array_equal(file.integers("t2d").astype(np.bool_), t2d):
        raise InvalidInput("t2d and d2t disagree about the tokens that it proposes")
    return d2t, t2d


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file of tensors, mapped, with its tensors by our names."""

    path: Path
    data: NDArray[np.uint8]
    places: Mapping[str, TensorSpan]

    @classmethod
    def open(cls, path: Path) -> "_File":
        if path.name == torch_file.WEIGHTS:
            places = torch_file.read(path)
        else:
            with path.open("rb") as file:
                places = safetensors_header.read(file)
        return cls.of(path, {our_name(place.name): place for place in places})

    @classmethod
    def of(cls, path: Path, places: Mapping[str, TensorSpan]) -> "_File":
        return cls(path=path, data=np.memmap(path, dtype=np.uint8, mode="r"), places=places)

    def blocks(self, name: str, num_rows: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Yield the values of a float tensor or of its first rows in order, in blocks of the same size for all tensors."""
        place = self.places[name]
        item = safetensors_header.ITEM_BYTES[place.dtype]
        end = place.end if num_rows is None else place.begin + num_rows * place.shape[1] * item
        for begin in range(place.begin, end, _BLOCK_VALUES * item):
            raw = self.data[begin : min(begin + _BLOCK_VALUES * item, end)]
            if place.dtype == "BF16":
                yield bfloat16.values(raw.view("<u2"))
            elif place.dtype in _FLOATS:
                yield raw.view("<f2" if place.dtype == "F16" else "<f4").astype(np.float32)
            else:
                raise InvalidInput(f"{place.name} in {self.path} is {place.dtype}; supported are {', '.join(_FLOATS)}")

    def integers(self, name: str) -> NDArray[np.int64]:
        """Return a whole tensor of integers or booleans, flat."""
        place = self.places[name]
        numpy_dtype = {"I64": "<i8", "I32": "<i4", "BOOL": "u1"}.get(place.dtype)
        if numpy_dtype is None:
            raise InvalidInput(f"{place.name} is {place.dtype}, integers are expected")
        return self.data[place.begin : place.end].view(numpy_dtype).astype(np.int64)

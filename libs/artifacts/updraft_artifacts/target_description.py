"""Describes a target for trainer, registry, agents and CLI, without implementing its forward pass.

Nothing here depends on how layers compute, so mixtures of experts, hybrids and quantised checkpoints are described like any
other. `FAMILIES` has what published config files leave out; a family that is not in it is described by the same rules.
Sizes may be nested in `text_config`. Facts of each family are from its config and model classes in transformers 5.24.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from updraft_artifacts import target_tensors
from updraft_artifacts.draft_shape import DraftShape, default_vocab_size
from updraft_artifacts.rope import SCALINGS, Rope, rope_parameters
from updraft_artifacts.target_tensors import HeadPlaces
from updraft_chassis.errors import InvalidInput

_HEAD_DIM = 128
"""Head size of a draft for a target whose heads are compressed, as in published drafts for such targets."""
_KV_HEADS = 8

MOST_LAYERS = 1024
_LAYERS = (7, MOST_LAYERS)
"""Three different layers are captured: the inputs of 2, L // 2 and L - 3."""
_MOST = 2**24
"""No size of a model comes near this."""
_MOST_EPS = 0.1
_QUANTIZATION_CHARS = 64
_MOST_SCALE = 1e4
"""Nor does a scale of logits, or one over it: known ones are between 1/64 and 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The properties that a family's config.json does not state. The defaults are Llama's."""

    norm_offset: float = 0.0
    """A norm multiplies by this plus its stored weight."""
    theta: float = 10_000.0
    """Default base of the rotary embedding."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sizes that published files omit where they equal the default of the family's config class."""


_ZERO_CENTRED = Family(norm_offset=1.0)
_GEMMA3 = Family(
    norm_offset=1.0,
    theta=1_000_000.0,
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
    },
)
_GEMMA4 = Family(
    theta=1_000_000.0,
    defaults={
        "vocab_size": 262_144,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
    },
)
_LLAMA4 = Family(theta=500_000.0, defaults={"num_key_value_heads": 8, "head_dim": 128})
_MINIMAX = Family(theta=5_000_000.0)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("gemma", "gemma2", "vaultgemma"), _ZERO_CENTRED),
    **dict.fromkeys(("gemma3", "gemma3_text"), _GEMMA3),
    **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA4),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _ZERO_CENTRED),
    "step3p7": _ZERO_CENTRED,
    **dict.fromkeys(("llama4", "llama4_text"), _LLAMA4),
    "minimax_m2": _MINIMAX,
    **dict.fromkeys(
        ("minimax_m3_vl", "minimax_m3_vl_text"), Family(norm_offset=1.0, theta=5_000_000.0, defaults={"head_dim": 128})
    ),
    "qwen3": Family(defaults={"head_dim": 128}),
    "gpt_oss": Family(theta=150_000.0),
}
"""By `model_type`."""

_ALIASES = {
    "num_hidden_layers": ("num_layers", "n_layer"),
    "num_attention_heads": ("n_head",),
    "head_dim": ("attention_head_dim",),
    "max_position_embeddings": ("model_max_length", "max_sequence_length", "n_positions"),
}
_EPSILONS = {
    "rms_norm_eps": "rms", "norm_eps": "rms", "rms_norm_epsilon": "rms", "layer_norm_epsilon": "rms",
    "layer_norm_eps": "layer", "norm_epsilon": "layer",
}  # fmt: skip
"""Names of a norm's epsilon, with the kind of norm that has it. Nemotron-H's RMS norms have a `layer_norm_epsilon`."""


TORCH_ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM",
)  # fmt: skip
"""Names in `architectures` that the torch engine runs, unless the weights are quantised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetDescription:
    """Sizes of a target, what surrounds its layers, and where that is."""

    model_type: str
    engine: Literal["torch", "sglang"]
    """torch if it runs the model, else sglang."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position: int
    norm_kind: Literal["rms", "layer"]
    norm_eps: float
    norm_offset: float
    """The final norm multiplies by this plus its stored weight."""
    is_tied: bool
    logit_scale: float
    """Logits are the head's outputs times this."""
    logit_cap: float | None
    """Logits are then squashed to cap * tanh(logits / cap)."""
    rope: Rope
    """For a draft: the base and scaling of the target's layers with full attention, over whole heads."""
    draft_shape: DraftShape
    """The default."""
    eos_token_ids: frozenset[int]
    places: HeadPlaces

    @property
    def aux_layers(self) -> tuple[int, int, int]:
        """Layers whose *inputs* are the auxiliary states, as in SGLang's default [2, L // 2, L - 3]."""
        return default_aux_layers(self.num_layers)

    @classmethod
    def of(
        cls, content: Mapping[str, Any], files: Mapping[str, str], generation: Mapping[str, Any] | None = None
    ) -> Self:
        """Describe the target with this config.json and generation_config.json; `files` maps names of tensors to files.

        InvalidInput is one sentence that names the missing or absurd value, or the missing tensor.
        """
        text = _text(content)
        family = FAMILIES.get(str(text.get("model_type")), FAMILIES.get(str(content.get("model_type")), Family()))
        sizes = Sizes(text, family.defaults)
        try:
            places = target_tensors.find(files, is_tied=_is_tied(text, content))
            norm_kind, norm_eps = _norm(sizes)
            return cls(
                model_type=str(content.get("model_type") or "an unnamed family"),
                engine=_engine(content),
                vocab_size=sizes.size("vocab_size"),
                hidden_size=sizes.size("hidden_size"),
                num_layers=sizes.size("num_hidden_layers", _LAYERS),
                max_position=sizes.size("max_position_embeddings", (1, 2**40)),
                norm_kind=norm_kind,
                norm_eps=norm_eps,
                norm_offset=family.norm_offset,
                is_tied=places.head is None,
                logit_scale=_logit_scale(sizes),
                logit_cap=_positive(text, "final_logit_softcapping"),
                rope=_rope(sizes.content, family.theta),
                draft_shape=_draft_shape(sizes),
                eos_token_ids=eos_token_ids(generation or {}, text, content),
                places=places,
            )
        except KeyError as error:
            raise InvalidInput(f"config.json lacks {error.args[0]}") from None
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InvalidInput(f"config.json has a bad value: {error}") from None


def quantization(content: Mapping[str, Any]) -> str:
    """How the weights are quantized according to config.json: the method, and its format if it has several; "" if they are not.

    At most 64 characters, because it goes into every trace.
    """
    stated = content.get("quantization_config") or _text(content).get("quantization_config")
    if not isinstance(stated, Mapping):
        return ""
    method = str(stated.get("quant_method") or "unknown")
    kind = stated.get("quant_algo") or stated.get("format")
    text = f"{method}/{kind}" if kind else method
    return "".join(char if char.isprintable() else "?" for char in text[:_QUANTIZATION_CHARS])


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """Layers whose *inputs* are the auxiliary states, as in SGLang's default [2, L // 2, L - 3]."""
    return (2, num_layers // 2, num_layers - 3)


def eos_token_ids(*contents: Mapping[str, Any]) -> frozenset[int]:
    """End tokens of the first file or part that states some; published files state some beyond the vocabulary.

    ValueError if they are not whole numbers.
    """
    for content in contents:
        stated = content.get("eos_token_id")
        if stated is not None:
            tokens = stated if isinstance(stated, list) else [stated]
            if any(type(token) is not int for token in tokens):
                raise ValueError(f"eos_token_id is {stated!r}")
            return frozenset(tokens)
    return frozenset()


def checked_eps(eps: float, name: str = "rms_norm_eps") -> float:
    """Return the epsilon of a norm; InvalidInput unless it is above 0 and at most 0.1."""
    if not 0 < eps <= _MOST_EPS:  # also refuses NaN
        raise InvalidInput(f"its {name} is {eps}, not above 0 and at most {_MOST_EPS}")
    return eps


class Sizes:
    """Sizes in config.json, under any of their names, or else the defaults of its family."""

    def __init__(self, content: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        names = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
        stated = {key: value for key, value in content.items() if value is not None}
        aliased = {names[key]: value for key, value in stated.items() if key in names}
        self.content: dict[str, Any] = {**defaults, **aliased, **stated}

    def size(self, name: str, bounds: tuple[int, int] = (1, _MOST)) -> int:
        """KeyError if it is missing, InvalidInput unless it is a whole number within the bounds."""
        value = self.content[name]
        if type(value) is not int or not bounds[0] <= value <= bounds[1]:
            raise InvalidInput(f"its {name} is {value!r}, expected {bounds[0]} to {bounds[1]:,}")
        return value

    def optional(self, name: str, default: int) -> int:
        return self.size(name) if name in self.content else default


def _text(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the language model. Its keys win over those beside it."""
    nested = content.get("text_config") or content.get("llm_config")
    return {**content, **nested} if isinstance(nested, Mapping) else content


def _engine(content: Mapping[str, Any]) -> Literal["torch", "sglang"]:
    names = content.get("architectures")
    has_torch = isinstance(names, list) and any(name in TORCH_ARCHITECTURES for name in names)
    return "torch" if has_torch and not content.get("quantization_config") else "sglang"


def _is_tied(text: Mapping[str, Any], content: Mapping[str, Any]) -> bool | None:
    """Whether config.json ties the head, of the language model or else of the whole; None if it states nothing or both."""
    stated = {bool(part["tie_word_embeddings"]) for part in (text, content) if "tie_word_embeddings" in part}
    return stated.pop() if len(stated) == 1 else None


def _norm(sizes: Sizes) -> tuple[Literal["rms", "layer"], float]:
    name = next((name for name in _EPSILONS if name in sizes.content), None)
    if name is None:
        return "rms", 1e-6
    eps = checked_eps(_positive(sizes.content, name) or 0.0, name)
    return "layer" if _EPSILONS[name] == "layer" else "rms", eps


def _logit_scale(sizes: Sizes) -> float:
    """Granite and Inkling divide by a scale of their own name; HyperCLOVA-X multiplies by Granite's, Cohere and Falcon-H1 by
    their own. MiniCPM divides by the hidden size over that of a small model. InvalidInput for an absurd scale."""
    content = sizes.content
    scaling = _positive(content, "logits_scaling")
    multiplies = "hyperclovax" in str(content.get("model_type"))
    multiplied = _positive(content, "logit_scale") or _positive(content, "lm_head_multiplier")
    divided = _positive(content, "logits_mup_width_multiplier")
    if scaling is not None:
        multiplied, divided = (scaling, divided) if multiplies else (multiplied, scaling)
    if "dim_model_base" in content:
        divided = sizes.size("hidden_size") / sizes.size("dim_model_base")
    scale = (multiplied or 1.0) / (divided or 1.0)
    if not 1 / _MOST_SCALE <= scale <= _MOST_SCALE:
        raise InvalidInput(f"its logits are scaled by {scale:g}, expected {1 / _MOST_SCALE:g} to {_MOST_SCALE:g}")
    return scale


def _positive(content: Mapping[str, Any], name: str) -> float | None:
    """A positive number, or None if it is absent or null; InvalidInput for anything else."""
    value = content.get(name)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise InvalidInput(f"its {name} is {value!r}")
    return number


def _rope(content: Mapping[str, Any], theta: float) -> Rope:
    """The target's base and scaling; none where the scaling is of a kind that drafts do not have.

    A draft is a network of its own, so that costs no correctness: its heads are rotated over their whole size, by positions of
    the text.
    """
    parameters: Mapping[str, Any] = rope_parameters(content)
    kinds = [value for value in parameters.values() if isinstance(value, Mapping)]
    if kinds:  # by kind of layer
        parameters = parameters.get("full_attention") or parameters.get("main") or kinds[0]
    kept = {key: value for key, value in parameters.items() if key != "partial_rotary_factor"}
    if (kept.get("rope_type") or kept.get("type")) not in SCALINGS:
        kept = {"rope_theta": kept.get("rope_theta")}
    others = {key: value for key, value in content.items() if key not in {"partial_rotary_factor", "rope_scaling"}}
    return Rope.of_config({**others, "rope_parameters": kept}, theta=theta)


def _draft_shape(sizes: Sizes) -> DraftShape:
    hidden = sizes.size("hidden_size")
    layer = {**_heads(sizes, hidden), "intermediate_size": _intermediate(sizes, hidden)}
    vocab_size = default_vocab_size(vocab_size=sizes.size("vocab_size"), hidden_size=hidden, **layer)
    return DraftShape(**layer, vocab_size=vocab_size)


def _heads(sizes: Sizes, hidden: int) -> dict[str, int]:
    """The target's own, or heads of 128 where the target compresses its keys and values or has no attention."""
    content = sizes.content
    if "num_attention_heads" in content and not any(key.endswith("lora_rank") for key in content):
        heads = sizes.size("num_attention_heads")
        kv_heads = sizes.optional("num_key_value_heads", heads)
        head_dim = sizes.optional("head_dim", hidden // heads)
        if heads % kv_heads:
            raise InvalidInput(f"its {heads} heads do not divide into {kv_heads} key-value heads")
        if head_dim % 2 or not head_dim:
            raise InvalidInput(f"its head_dim is {head_dim}, but rotary embedding requires an even number")
        return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    heads = max(1, hidden // _HEAD_DIM)
    return {
        "num_heads": heads,
        "num_kv_heads": _KV_HEADS if heads % _KV_HEADS == 0 else heads,
        "head_dim": _HEAD_DIM,
    }


def _intermediate(sizes: Sizes, hidden: int) -> int:
    """The width of the target's dense MLP, or 3 D where it has none: experts are narrower than a draft's MLP should be."""
    content = sizes.content
    for name in ("intermediate_size_mlp", "dense_intermediate_size"):
        if name in content:
            return sizes.size(name)
    has_experts = any(key.endswith(("experts", "experts_per_tok")) and content[key] for key in content)
    if has_experts and ("moe_intermediate_size" not in content or sizes.optional("intermediate_size", 0) < hidden):
        return 3 * hidden
    return sizes.optional("intermediate_size", 3 * hidden)

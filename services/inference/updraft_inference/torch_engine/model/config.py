"""The shape of a target that the torch engine runs, and everything in which its forward pass differs from Llama's.

Other targets need another engine: their descriptions suffice for everything but the forward pass.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from updraft_artifacts.model_folder import read_json
from updraft_artifacts.rope import Rope, rope_parameters
from updraft_artifacts.target_description import (
    FAMILIES,
    MOST_LAYERS,
    Family,
    Sizes,
    checked_eps,
    default_aux_layers,
    eos_token_ids,
)
from updraft_chassis.errors import InvalidInput

_OTHER_ENGINE = "serve it with engine sglang"
_MOST_POSITIONS = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Properties of an architecture that neither its config.json nor its `Family` contains. The defaults are Llama's."""

    is_tied: bool = False
    """Default for config.json."""
    has_qkv_bias: bool = False
    has_head_norms: bool = False
    """A norm over each head of queries and keys, before rotation."""
    has_output_norms: bool = False
    """Norms of the outputs of attention and MLP, before they are added to the residual."""
    is_embedding_scaled: bool = False
    """Embeddings are multiplied by the square root of the hidden size before the first layer."""
    sliding: Literal["never", "all layers", "late layers", "pattern"] = "never"
    """Layers with the sliding window of config.json; late layers only if `use_sliding_window` is set."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(sliding="all layers"),
    "Qwen2ForCausalLM": Architecture(has_qkv_bias=True, sliding="late layers"),
    "Qwen3ForCausalLM": Architecture(has_head_norms=True, sliding="late layers"),
    "Gemma3ForCausalLM": Architecture(
        is_tied=True,
        has_head_norms=True,
        has_output_norms=True,
        is_embedding_scaled=True,
        sliding="pattern",
    ),
}

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """Sizes of a target, and everything in which its forward pass differs from Llama's."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    norm_offset: float
    """Every norm multiplies by this plus its stored weight."""
    activation: str
    attention_scale: float | None
    """Scale of queries times keys; None: 1 / sqrt(head_dim)."""
    has_attention_bias: bool
    """Bias of all four projections; see also `Architecture.has_qkv_bias`."""
    rope: Rope
    sliding_layers: frozenset[int]
    """Layers that attend only to the last `window` tokens, including the token itself."""
    window: int
    sliding_rope: Rope
    """For the sliding layers; the same as `rope` for most models."""
    max_position: int
    is_tied: bool
    eos_token_ids: frozenset[int]

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InvalidInput(f"its {self.num_heads} heads do not divide into {self.num_kv_heads} key-value heads")
        if self.head_dim % 2:
            raise InvalidInput(f"its head_dim is {self.head_dim}, but rotary embedding requires an even number")

    @property
    def aux_layers(self) -> tuple[int, int, int]:
        return default_aux_layers(self.num_layers)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json of a Hugging Face folder; InvalidInput if the engine does not support the model."""
        content = read_json(folder / "config.json")
        try:
            return cls._read(content, _architecture(content), _end_tokens(content, folder))
        except KeyError as error:
            raise InvalidInput(f"{folder / 'config.json'} lacks {error}") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InvalidInput(f"{folder / 'config.json'} has a bad value: {error}") from None
        except InvalidInput as error:
            raise InvalidInput(f"the model in {folder} cannot be served: {error}") from None

    @classmethod
    def _read(cls, content: dict[str, Any], architecture: Architecture, end_tokens: frozenset[int]) -> Self:
        family = FAMILIES.get(content["model_type"], Family())
        sizes = Sizes(content, family.defaults)
        hidden, heads = sizes.size("hidden_size"), sizes.size("num_attention_heads")
        num_layers = sizes.size("num_hidden_layers", (1, MOST_LAYERS))
        rope, sliding_rope = _ropes(content)
        window, sliding_layers = _sliding(content, architecture, num_layers)
        return cls(
            architecture=architecture,
            vocab_size=sizes.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=sizes.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=sizes.optional("num_key_value_heads", heads),
            head_dim=sizes.optional("head_dim", max(1, hidden // heads)),
            rms_norm_eps=checked_eps(float(content["rms_norm_eps"])),
            norm_offset=family.norm_offset,
            activation=_activation(content),
            attention_scale=_attention_scale(content),
            has_attention_bias=bool(content.get("attention_bias", False)),
            rope=rope,
            sliding_layers=sliding_layers,
            window=window,
            sliding_rope=sliding_rope,
            max_position=sizes.size("max_position_embeddings", (1, _MOST_POSITIONS)),
            is_tied=bool(content.get("tie_word_embeddings", architecture.is_tied)),
            eos_token_ids=end_tokens,
        )


def _architecture(content: dict[str, Any]) -> Architecture:
    """InvalidInput if the architecture or a part of it is not supported."""
    names = content.get("architectures") or []
    architecture = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    if architecture is None:
        raise InvalidInput(
            f"it is {' '.join(names) or 'an unnamed architecture'}; the torch engine runs {', '.join(ARCHITECTURES)};"
            f" {_OTHER_ENGINE}"
        )
    unsupported = ("mlp_bias", "quantization_config", "attn_logit_softcapping", "final_logit_softcapping")
    for key in (*unsupported, "use_bidirectional_attention"):
        if content.get(key):
            raise InvalidInput(f"its config.json has {key}, which the torch engine does not support; {_OTHER_ENGINE}")
    return architecture


def _attention_scale(content: dict[str, Any]) -> float | None:
    scalar = content.get("query_pre_attn_scalar")
    if scalar is None:
        return None
    if not 0 < float(scalar) < math.inf:
        raise InvalidInput(f"its query_pre_attn_scalar is {scalar!r}")
    scale: float = float(scalar) ** -0.5
    return scale


def _activation(content: dict[str, Any]) -> str:
    activation = str(content.get("hidden_activation") or content.get("hidden_act") or "silu")
    if activation not in ACTIVATIONS:
        raise InvalidInput(
            f"its activation is {activation}; supported are {' and '.join(ACTIVATIONS)}; {_OTHER_ENGINE}"
        )
    return activation


def _ropes(content: dict[str, Any]) -> tuple[Rope, Rope]:
    """For full and for sliding layers. Gemma has two; its older configs have `rope_local_base_freq`."""
    parameters = rope_parameters(content)
    if "full_attention" in parameters:
        max_position = content.get("max_position_embeddings")
        kinds = (parameters["full_attention"], parameters["sliding_attention"])
        return Rope.of(kinds[0], max_position=max_position), Rope.of(kinds[1], max_position=max_position)
    local = content.get("rope_local_base_freq")
    rope = Rope.of_config(content, theta=10_000.0 if local is None else 1_000_000.0)
    return rope, rope if local is None else Rope(theta=float(local))


def _sliding(content: dict[str, Any], architecture: Architecture, num_layers: int) -> tuple[int, frozenset[int]]:
    """The window and its layers, by the rules of each family's config class in transformers; 0 and no layers if unused."""
    is_late = architecture.sliding == "late layers"
    window = content.get("sliding_window", None if is_late else 4096)
    if architecture.sliding == "never" or not window or (is_late and not content.get("use_sliding_window")):
        return 0, frozenset()
    if type(window) is not int or not 1 <= window <= _MOST_POSITIONS:
        raise InvalidInput(f"its sliding_window is {window!r}")
    types = content.get("layer_types")
    if architecture.sliding == "all layers":
        sliding = list(range(num_layers))
    elif types is not None:
        sliding = [i for i, name in enumerate(types) if name == "sliding_attention"]
    elif is_late:
        sliding = list(range(int(content.get("max_window_layers", 28)), num_layers))
    else:
        pattern = int(content.get("sliding_window_pattern", 6))
        sliding = [i for i in range(num_layers) if (i + 1) % pattern]
    return window, frozenset(sliding)


def _end_tokens(content: dict[str, Any], folder: Path) -> frozenset[int]:
    generation = folder / "generation_config.json"
    return eos_token_ids(read_json(generation) if generation.exists() else {}, content)

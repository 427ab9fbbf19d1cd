"""The shape of an EAGLE-3 draft, read from and written to Hugging Face config files.

A draft's file has the format that stock SGLang and vLLM read (`LlamaForCausalLMEagle3`), so it needs no conversion.
"""

import json
from dataclasses import dataclass
from typing import Any, Protocol, Self

from updraft_artifacts.draft_shape import ShapeChoice
from updraft_artifacts.rope import Rope
from updraft_artifacts.target_description import TargetDescription, checked_eps
from updraft_chassis.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Sizes of a draft. `aux_layers` index target layers by their input, as in SGLang."""

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position: int
    target_hidden_size: int
    aux_layers: tuple[int, ...]
    norm_before_residual: bool = False
    """The residual is the normed state, as in drafts made with vLLM's speculators. SGLang does not support it."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InvalidInput(f"{self.num_heads} heads do not divide into {self.num_kv_heads} key-value heads")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise InvalidInput(f"draft_vocab_size {self.draft_vocab_size} is not within 1..{self.vocab_size}")
        if len(set(self.aux_layers)) != len(self.aux_layers):
            raise InvalidInput(f"auxiliary layers {list(self.aux_layers)} repeat: the target has too few layers")

    @classmethod
    def of_target(cls, target: TargetDescription, choice: ShapeChoice) -> Self:
        """A layer of the target's width with full attention, of the default shape but for what is chosen."""
        shape = choice.of(target.draft_shape, target.vocab_size)
        return cls(
            vocab_size=target.vocab_size,
            draft_vocab_size=shape.vocab_size,
            hidden_size=target.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=target.norm_eps,
            rope=target.rope,
            max_position=target.max_position,
            target_hidden_size=target.hidden_size,
            aux_layers=target.aux_layers,
        )

    @property
    def aux_size(self) -> int:
        """Width of the concatenated auxiliary states."""
        return len(self.aux_layers) * self.target_hidden_size

    def to_json(self) -> str:
        content = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "hidden_size": self.hidden_size,
            "target_hidden_size": self.target_hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            **self.rope.to_dict(),
            **({"norm_before_residual": True} if self.norm_before_residual else {}),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
            # Not the layer ids of eagle_config: SGLang adds one to them and vLLM does not. Both default to our layers.
            "updraft": {"aux_layers": list(self.aux_layers)},
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Read config.json; InvalidInput names the missing key or the unsupported shape."""
        if content.get("num_hidden_layers", 1) != 1:
            raise InvalidInput(f"a draft of {content['num_hidden_layers']} layers is not supported, only 1")
        try:
            hidden, heads = int(content["hidden_size"]), int(content["num_attention_heads"])
            return cls(
                vocab_size=int(content["vocab_size"]),
                draft_vocab_size=int(content.get("draft_vocab_size") or content["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(content["intermediate_size"]),
                num_heads=heads,
                num_kv_heads=int(content.get("num_key_value_heads") or heads),
                head_dim=int(content.get("head_dim") or hidden // heads),
                rms_norm_eps=checked_eps(float(content["rms_norm_eps"])),
                rope=Rope.of_config(content),
                max_position=int(content["max_position_embeddings"]),
                target_hidden_size=int(content.get("target_hidden_size") or hidden),
                aux_layers=tuple(int(i) for i in content["updraft"]["aux_layers"]),
                norm_before_residual=bool(content.get("norm_before_residual", False)),
            )
        except KeyError as error:
            raise InvalidInput(f"config.json of the draft lacks {error}") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InvalidInput(f"config.json of the draft has a bad value: {error}") from None


class TargetSizes(Protocol):
    """Sizes that a draft has in common with its target."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_position(self) -> int: ...
    @property
    def aux_layers(self) -> tuple[int, ...]: ...


def check_fits(draft: DraftConfig, target: TargetSizes) -> str | None:
    """The reason why a draft cannot serve this target, in one sentence; None if it can."""
    pairs = [
        ("vocabulary", draft.vocab_size, target.vocab_size),
        ("target hidden size", draft.target_hidden_size, target.hidden_size),
        ("embedding width", draft.hidden_size, target.hidden_size),
    ]
    for name, ours, theirs in pairs:
        if ours != theirs:
            return f"the draft's {name} is {ours}, the target's is {theirs}"
    if draft.aux_layers != target.aux_layers:
        return f"the draft reads layers {list(draft.aux_layers)}, the engine captures {list(target.aux_layers)}"
    if draft.max_position < target.max_position:
        return f"the draft supports {draft.max_position} positions, the target {target.max_position}"
    return None

"""Shape of an EAGLE-3 draft and of the target it belongs to, read from and written to Hugging Face config files.

The file is the one that stock SGLang and vLLM read (`LlamaForCausalLMEagle3`), so a checkpoint folder needs no conversion.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from updraft_chassis.errors import InvalidInput
from updraft_chassis.model_folder import read_json


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """Layers whose *inputs* are the auxiliary states: SGLang's default [2, L // 2, L - 3] (the output of the layer before)."""
    return (2, num_layers // 2, num_layers - 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Sizes of the draft. `aux_layers` index target layers by their input, as SGLang counts."""

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position: int
    target_hidden_size: int
    aux_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InvalidInput(f"{self.num_heads} heads do not divide into {self.num_kv_heads} key-value heads")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise InvalidInput(f"draft_vocab_size {self.draft_vocab_size} is not within 1..{self.vocab_size}")
        if len(set(self.aux_layers)) != len(self.aux_layers):
            raise InvalidInput(
                f"auxiliary layers {list(self.aux_layers)} repeat: the target is too shallow for the default"
            )

    @property
    def aux_size(self) -> int:
        """Width of the concatenated auxiliary states."""
        return len(self.aux_layers) * self.target_hidden_size

    def to_json(self) -> str:
        """config.json of the checkpoint."""
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
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
            # Not eagle_config's layer ids: SGLang adds one to those and vLLM does not. Both default to what we use.
            "updraft": {"aux_layers": list(self.aux_layers)},
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Read config.json; InvalidInput with the missing key or the unsupported shape."""
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
                rms_norm_eps=float(content["rms_norm_eps"]),
                rope_theta=float(content.get("rope_theta") or content.get("rope_parameters", {})["rope_theta"]),
                max_position=int(content["max_position_embeddings"]),
                target_hidden_size=int(content.get("target_hidden_size") or hidden),
                aux_layers=tuple(int(i) for i in content["updraft"]["aux_layers"]),
            )
        except KeyError as error:
            raise InvalidInput(f"config.json of the draft lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"config.json of the draft has a bad value: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """Sizes of a Llama-family target."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position: int
    is_tied: bool
    eos_token_ids: frozenset[int]

    @property
    def aux_layers(self) -> tuple[int, int, int]:
        """Layers whose inputs the draft reads."""
        return default_aux_layers(self.num_layers)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json of a Hugging Face folder; InvalidInput if it is no Llama-family model that the engine runs."""
        content = read_json(folder / "config.json")
        _refuse_unsupported(content, folder)
        try:
            hidden, heads = int(content["hidden_size"]), int(content["num_attention_heads"])
            rope = content.get("rope_parameters") or {}
            return cls(
                vocab_size=int(content["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(content["intermediate_size"]),
                num_layers=int(content["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(content.get("num_key_value_heads") or heads),
                head_dim=int(content.get("head_dim") or hidden // heads),
                rms_norm_eps=float(content["rms_norm_eps"]),
                rope_theta=float(content.get("rope_theta") or rope.get("rope_theta") or 10000.0),
                max_position=int(content["max_position_embeddings"]),
                is_tied=bool(content.get("tie_word_embeddings", False)),
                eos_token_ids=_eos(content, folder),
            )
        except KeyError as error:
            raise InvalidInput(f"{folder / 'config.json'} lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{folder / 'config.json'} has a bad value: {error}") from None

    def draft(self, *, draft_vocab_size: int) -> DraftConfig:
        """A draft of the shape of one target layer."""
        return DraftConfig(
            vocab_size=self.vocab_size,
            draft_vocab_size=draft_vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            max_position=self.max_position,
            target_hidden_size=self.hidden_size,
            aux_layers=self.aux_layers,
        )


def _refuse_unsupported(content: dict[str, Any], folder: Path) -> None:
    architectures = content.get("architectures") or []
    if "LlamaForCausalLM" not in architectures:
        raise InvalidInput(
            f"{folder} holds {architectures or 'an unnamed architecture'}; this engine runs LlamaForCausalLM"
        )
    scaling = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if scaling.get("rope_type", "default") != "default":
        raise InvalidInput(f"{folder} scales its rotary embedding ({scaling['rope_type']}), which this engine does not")
    for bias in ("attention_bias", "mlp_bias"):
        if content.get(bias):
            raise InvalidInput(f"{folder} has {bias}, which this engine does not support")


def _eos(content: dict[str, Any], folder: Path) -> frozenset[int]:
    """End tokens of generation_config.json if there is one, else of config.json."""
    generation = folder / "generation_config.json"
    declared = read_json(generation).get("eos_token_id") if generation.exists() else None
    declared = content.get("eos_token_id") if declared is None else declared
    if declared is None:
        return frozenset()
    return frozenset(declared if isinstance(declared, list) else [declared])

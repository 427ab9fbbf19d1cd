"""Rotary embedding as config.json states it: its base, and how a model that was taught longer texts stretches it.

Two stretches are known, those of published models of the families that run here: "linear" (all frequencies slower by a
factor) and "llama3" (slow ones only). Others change with the length of the text or the scores, and are refused.
"""

from dataclasses import dataclass
from typing import Any, Self

from updraft_chassis.errors import InvalidInput

_KEYS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Base and stretch; the last four say nothing where `kind` does not use them."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0

    @classmethod
    def of(cls, parameters: dict[str, Any], *, theta: float | None = None) -> Self:
        """Read `rope_parameters`, or an older `rope_scaling` with `theta` beside it.

        KeyError or ValueError for what is missing or no number, InvalidInput for a stretch that is not known.
        """
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        base = float(parameters["rope_theta"] if theta is None else theta)
        if float(parameters.get(_PARTIAL) or 1.0) != 1.0:
            raise InvalidInput("only a part of each head is rotated, which is not supported (partial_rotary_factor)")
        if kind == "default":
            return cls(theta=base)
        if kind not in _KEYS:
            raise InvalidInput(f"the rotary embedding is scaled by {kind}; supported are {', '.join(_KEYS)} and none")
        numbers = {key: float(parameters[key]) for key in _KEYS[kind]}
        original = int(parameters[_ORIGINAL]) if kind == "llama3" else 0
        return cls(theta=base, kind=kind, original_max_position=original, **numbers)

    @classmethod
    def of_config(cls, content: dict[str, Any], *, theta: float | None = None) -> Self:
        """Read a config.json of any age; `theta` where it states none."""
        parameters = content.get("rope_parameters") or content.get("rope_scaling") or {}
        parameters = {_PARTIAL: content.get(_PARTIAL)} | parameters
        return cls.of(parameters, theta=content.get("rope_theta") or parameters.get("rope_theta") or theta)

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json that SGLang, vLLM and transformers all read."""
        if self.kind == "default":
            return {"rope_theta": self.theta}
        scaling = {"rope_type": self.kind} | {key: getattr(self, key) for key in _KEYS[self.kind]}
        if self.original_max_position:
            scaling[_ORIGINAL] = self.original_max_position
        return {"rope_theta": self.theta, "rope_scaling": scaling}

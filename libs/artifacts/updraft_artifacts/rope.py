"""Rotary embedding as config.json states it: its base, and how a model that was taught longer texts stretches it.

Three stretches are known, those of published models of the families that run here: "linear" (all frequencies slower by a
factor), "llama3" (slow ones only) and "yarn" (slow ones only, and queries and keys are made longer). Others change with the
length of the text, and are refused.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from updraft_chassis.errors import InvalidInput

_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow"),
}
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Of yarn where config.json states none: those that its paper found for Llama."""

_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"

_HUGE = 1e15
"""No model comes near it or one by it. Squared, as scores have an attention factor, it is still within float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Base and stretch; the others say nothing where `kind` does not use them."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 1.0
    beta_slow: float = 1.0
    """Turns in the original context: yarn slows no frequency that has more than the first, and fully those with fewer than the
    second."""
    truncate: bool = True
    """Yarn's ramp between the two begins and ends at whole frequencies."""
    attention_factor: float = 1.0
    """What cosines and sines are multiplied by."""

    @classmethod
    def of(cls, parameters: dict[str, Any], *, theta: float | None = None, max_position: int | None = None) -> Self:
        """Read `rope_parameters`, or an older `rope_scaling` with `theta` beside it; the model knows `max_position` positions.

        KeyError, TypeError, ValueError or ArithmeticError for what is missing or no number; InvalidInput for a stretch that is
        not known, or a number that nothing can be stretched by.
        """
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        base = _number("rope_theta", parameters["rope_theta"] if theta is None else theta)
        if float(parameters.get(_PARTIAL) or 1.0) != 1.0:
            raise InvalidInput("only a part of each head is rotated, which is not supported (partial_rotary_factor)")
        if kind == "default":
            return cls(theta=base)
        if kind not in _NUMBERS:
            raise InvalidInput(
                f"the rotary embedding is scaled by {kind}; supported are {', '.join(_NUMBERS)} and none"
            )
        if kind == "yarn":
            return cls(theta=base, kind=kind, **_yarn(parameters, base, max_position))
        numbers: dict[str, Any] = {key: _number(key, parameters[key]) for key in _NUMBERS[kind]}
        if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
            raise InvalidInput("the rotary embedding's high_freq_factor is not above its low_freq_factor")
        original = _original(parameters, max_position) if kind == "llama3" else 0
        return cls(theta=base, kind=kind, original_max_position=original, **numbers)

    @classmethod
    def of_config(cls, content: dict[str, Any], *, theta: float | None = None) -> Self:
        """Read a config.json of any age; `theta` where it states none."""
        parameters = content.get("rope_parameters") or content.get("rope_scaling") or {}
        parameters = {_PARTIAL: content.get(_PARTIAL)} | parameters
        if content.get(_ORIGINAL) is not None:  # goes first in transformers too
            parameters[_ORIGINAL] = content[_ORIGINAL]
        theta = content.get("rope_theta") or parameters.get("rope_theta") or theta
        return cls.of(parameters, theta=theta, max_position=content.get("max_position_embeddings"))

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json by which SGLang, vLLM and transformers all compute the same."""
        if self.kind == "default":
            return {"rope_theta": self.theta}
        scaling = {"rope_type": self.kind} | {key: getattr(self, key) for key in _NUMBERS[self.kind]}
        if self.original_max_position:
            scaling[_ORIGINAL] = self.original_max_position
        if self.kind == "yarn":
            scaling |= {"truncate": self.truncate, **_said(self.attention_factor, self.factor)}
        return {"rope_theta": self.theta, "rope_scaling": scaling}


def _number(name: str, value: Any) -> float:
    number = float(value)
    if not 1 / _HUGE < number < _HUGE:  # nor is NaN
        raise InvalidInput(f"the rotary embedding's {name} is {number:g}, not between {1 / _HUGE:g} and {_HUGE:g}")
    return number


def _original(parameters: dict[str, Any], max_position: int | None) -> int:
    """Positions that the model was taught first: as in transformers all that it knows, where config.json does not say."""
    said = parameters.get(_ORIGINAL)
    said = max_position if said is None else said
    if said is None:
        raise KeyError(_ORIGINAL)
    return int(_number(_ORIGINAL, int(said)))


def _yarn(parameters: dict[str, Any], theta: float, max_position: int | None) -> dict[str, Any]:
    """Fields of yarn, with the defaults of transformers' `_compute_yarn_parameters`."""
    original = _original(parameters, max_position)
    factor = parameters["factor"]
    if factor is None:
        factor = (original if max_position is None else max_position) / original
    factor = _number("factor", factor)
    fast, slow = (_number(key, parameters.get(key) or usual) for key, usual in _BETAS.items())
    if fast <= slow:
        raise InvalidInput(f"the rotary embedding's beta_fast is {fast:g}, not above its beta_slow, {slow:g}")
    if theta <= 1:
        raise InvalidInput(f"the rotary embedding's rope_theta is {theta:g}, and yarn knows only those above 1")
    return {
        "factor": factor,
        "original_max_position": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": bool(parameters.get("truncate", True)),
        "attention_factor": _attention_factor(parameters, factor),
    }


def _attention_factor(parameters: dict[str, Any], factor: float) -> float:
    """As stated, or what two scales of it make, or the paper's."""
    stated, scales = parameters.get("attention_factor"), (parameters.get("mscale"), parameters.get("mscale_all_dim"))
    if stated is None and all(scales):
        of_all, of_rotated = (_lengthening(factor, float(scale)) for scale in reversed(scales))
        stated = of_rotated / of_all
    return _number("attention_factor", _lengthening(factor) if stated is None else stated)


def _lengthening(factor: float, scale: float = 1.0) -> float:
    """How much longer queries and keys get with a context that is longer by `factor`: YaRN (arXiv 2309.00071), section 3.4."""
    return 1.0 + 0.1 * scale * math.log(factor) if factor > 1 else 1.0


def _said(attention_factor: float, factor: float) -> dict[str, float]:
    """Nothing for the one that all compute. SGLang knows no `attention_factor`, and multiplies its own by `attn_factor`."""
    usual = _lengthening(factor)
    if attention_factor == usual:
        return {}
    return {"attention_factor": attention_factor, "attn_factor": attention_factor / usual}

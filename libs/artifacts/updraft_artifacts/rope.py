"""Rotary embedding parameters of config.json: the base frequency and the scaling for long contexts.

Three kinds of scaling are supported, those of published models of the supported families: "linear" (all frequencies are
divided by a factor), "llama3" (only low ones) and "yarn" (only low ones, and queries and keys are multiplied by an attention
factor). Others depend on the length of the text and are rejected.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from updraft_chassis.errors import InvalidInput

_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow"),
}
SCALINGS = tuple(_NUMBERS)
"""Supported kinds."""

_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Defaults for yarn: the values that its paper recommends for Llama."""

_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"

_HUGE = 1e15
"""No model comes near this value or its inverse. Its square, as it would appear in attention scores, still fits in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Base and scaling. Fields that `kind` does not use keep their defaults."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 1.0
    beta_slow: float = 1.0
    """In rotations over the original context: yarn leaves frequencies above beta_fast unscaled and fully scales those below
    beta_slow."""
    truncate: bool = True
    """Whether yarn's ramp between the two is rounded to whole frequency indices."""
    attention_factor: float = 1.0
    """Multiplies cosines and sines."""

    @classmethod
    def of(cls, parameters: dict[str, Any], *, theta: float | None = None, max_position: int | None = None) -> Self:
        """Read `rope_parameters`, or an older `rope_scaling` with a separate `theta`, of a model with `max_position` positions.

        KeyError, TypeError, ValueError or ArithmeticError for a missing value or one that is not a number; InvalidInput for an
        unsupported kind or a number out of range.
        """
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        base = _number("rope_theta", parameters["rope_theta"] if theta is None else theta)
        if _number(_PARTIAL, parameters.get(_PARTIAL) or 1.0) != 1.0:
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
        """Read a config.json in the old or the new format; `theta` is the default base."""
        parameters = {_PARTIAL: content.get(_PARTIAL)} | rope_parameters(content)
        if content.get(_ORIGINAL) is not None:  # takes precedence in transformers too
            parameters[_ORIGINAL] = content[_ORIGINAL]
        theta = content.get("rope_theta") or parameters.get("rope_theta") or theta
        return cls.of(parameters, theta=theta, max_position=content.get("max_position_embeddings"))

    def to_dict(self) -> dict[str, Any]:
        """config.json keys for which SGLang, vLLM and transformers compute the same values."""
        if self.kind == "default":
            return {"rope_theta": self.theta}
        scaling = {"rope_type": self.kind} | {key: getattr(self, key) for key in _NUMBERS[self.kind]}
        if self.original_max_position:
            scaling[_ORIGINAL] = self.original_max_position
        if self.kind == "yarn":
            scaling |= {"truncate": self.truncate, **_attention_keys(self.attention_factor, self.factor)}
        # transformers 4 reads the one, transformers 5 the other; an engine that misses its own would serve without scaling.
        return {
            "rope_theta": self.theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }


def rope_parameters(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters in a config.json of the new or the old format, {} without any; ValueError if they are none."""
    for name in ("rope_parameters", "rope_scaling"):
        if parameters := content.get(name):
            if not isinstance(parameters, dict):
                raise ValueError(f"{name} is {parameters!r}")
            return parameters
    return {}


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}") from None
    if not 1 / _HUGE < number < _HUGE:  # nor is NaN
        raise InvalidInput(f"the rotary embedding's {name} is {number:g}, not between {1 / _HUGE:g} and {_HUGE:g}")
    return number


def _original(parameters: dict[str, Any], max_position: int | None) -> int:
    """Positions in the original context; the default is `max_position`, as in transformers."""
    original = parameters.get(_ORIGINAL)
    original = max_position if original is None else original
    if original is None:
        raise KeyError(_ORIGINAL)
    return int(_number(_ORIGINAL, math.floor(_number(_ORIGINAL, original))))


def _yarn(parameters: dict[str, Any], theta: float, max_position: int | None) -> dict[str, Any]:
    """Yarn's fields, with the defaults of `_compute_yarn_parameters` in transformers."""
    original = _original(parameters, max_position)
    factor = parameters["factor"]
    if factor is None:
        factor = (original if max_position is None else max_position) / original
    factor = _number("factor", factor)
    fast, slow = (_number(key, parameters.get(key) or usual) for key, usual in _BETAS.items())
    if fast <= slow:
        raise InvalidInput(f"the rotary embedding's beta_fast is {fast:g}, not above its beta_slow, {slow:g}")
    if theta <= 1:
        raise InvalidInput(f"the rotary embedding's rope_theta is {theta:g}, and yarn requires more than 1")
    return {
        "factor": factor,
        "original_max_position": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": bool(parameters.get("truncate", True)),
        "attention_factor": _attention_factor(parameters, factor),
    }


def _attention_factor(parameters: dict[str, Any], factor: float) -> float:
    """The stated factor, or the ratio of two scales, or the paper's default."""
    stated, scales = parameters.get("attention_factor"), (parameters.get("mscale"), parameters.get("mscale_all_dim"))
    if stated is None and all(scales):
        of_all, of_rotated = (_mscale(factor, float(scale)) for scale in reversed(scales))
        stated = of_rotated / of_all
    return _number("attention_factor", _mscale(factor) if stated is None else stated)


def _mscale(factor: float, scale: float = 1.0) -> float:
    """Scale of queries and keys for a context that is longer by `factor`: YaRN (arXiv 2309.00071), section 3.4."""
    return 1.0 + 0.1 * scale * math.log(factor) if factor > 1 else 1.0


def _attention_keys(attention_factor: float, factor: float) -> dict[str, float]:
    """Empty for the default. SGLang ignores `attention_factor` and multiplies its own default by `attn_factor`."""
    default = _mscale(factor)
    if attention_factor == default:
        return {}
    return {"attention_factor": attention_factor, "attn_factor": attention_factor / default}

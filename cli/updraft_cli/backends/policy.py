"""The rollout policy as a file: the names of registry.proto, in YAML or JSON, or in camelCase as in Kubernetes.

Fields that a file leaves out get the registry's defaults, and the registry validates the values.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from google.protobuf import json_format
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic.alias_generators import to_camel, to_snake

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput

_Count = Annotated[int, Field(ge=0, le=2**32 - 1)]
_Lower = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)

_ENUMS = {"strategy": "STRATEGY", "on_inconclusive": "ON_INCONCLUSIVE", "comparison": "COMPARISON"}
_AUTO = "auto"
_IGNORES_UNKNOWN = "ignores_unknown"


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, validate_by_name=True, validate_by_alias=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_unknown(cls, content: Any, info: ValidationInfo) -> Any:
        if not (info.context or {}).get(_IGNORES_UNKNOWN) or not isinstance(content, Mapping):
            return content
        return {name: value for name, value in content.items() if to_snake(name) in cls.model_fields}


class Step(_Part):
    pods_percent: _Count
    hold_seconds: _Count


class Analysis(_Part):
    """Settings of the live gate."""

    interval_seconds: _Count | None = None
    min_samples: _Count | None = None
    failure_limit: _Count | None = None
    max_acceptance_regression_percent: _Count | None = None
    max_latency_regression_percent: _Count | None = None
    on_inconclusive: Annotated[Literal["pause", "rollback", "promote"], _Lower] | None = None
    dry_run: bool | None = None
    confidence: float | None = None
    comparison: Annotated[Literal["auto", "pods", "switchback"], _Lower] | None = None
    switchback_seconds: _Count | None = None


class OfflineGate(_Part):
    """Settings of the gate on held-out requests."""

    min_samples: _Count | None = None
    min_gain_percent: float | None = None
    confidence: float | None = None


class Policy(_Part):
    """See registry.proto for the meaning of each field."""

    strategy: Annotated[Literal["canary", "immediate", "manual"], _Lower] | None = None
    steps: tuple[Step, ...] | None = None
    analysis: Analysis | None = None
    auto_rollback: bool | None = None
    progress_deadline_seconds: _Count | None = None
    max_pods_swapping: _Count | None = None
    revision_history_limit: _Count | None = None
    offline_gate: OfflineGate | None = None

    @classmethod
    def from_proto(cls, message: pb.RolloutPolicy) -> Self:
        """Return the policy that a registry has in force."""
        content = json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return cls.model_validate(_words(content))

    @classmethod
    def from_kubernetes(cls, fields: Mapping[str, Any]) -> Self:
        """Return the policy in spec.rollout; fields of a newer CRD are ignored."""
        return cls.model_validate(fields, context={_IGNORES_UNKNOWN: True})

    def to_proto(self) -> pb.RolloutPolicy:
        """Return it as a message for SetPolicy."""
        return json_format.ParseDict(_constants(self.plain()), pb.RolloutPolicy())

    def plain(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, mode="json")

    def kubernetes_fields(self, *, is_whole: bool = False) -> dict[str, Any]:
        """Return it as a merge patch of spec.rollout; a whole one removes the fields that it leaves out."""
        fields = _capitalised(self.model_dump(exclude_none=True, mode="json", by_alias=True))
        if is_whole:
            analysis = _absent(Analysis) | fields.get("analysis", {})
            fields = _absent(Policy) | fields | {"analysis": analysis}
        return fields

    def with_changes(self, changes: Mapping[str, Any]) -> "Policy":
        """Return a copy with other values, by path: {"analysis.confidence": 0.9}."""
        content = self.plain()
        for path, value in changes.items():
            *parts, name = path.split(".")
            inner = content
            for part in parts:
                inner = inner.setdefault(part, {})
            inner[name] = value
        return Policy.model_validate(content)

    def changes(self, before: "Policy") -> Iterator[tuple[str, Any, Any]]:
        """Yield the path, old value and new value of each difference."""
        old, new = dict(_flat(before.plain())), dict(_flat(self.plain()))
        for path in dict.fromkeys((*old, *new)):
            if old.get(path) != new.get(path):
                yield path, old.get(path), new.get(path)


def read(text: str, where: str) -> Policy:
    """Return the policy in a file; InvalidInput names every mistake in it."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInput(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"{where} is not a policy: expected names and values, e.g. `strategy: canary`")
    try:
        return Policy.model_validate(content)
    except ValidationError as error:
        raise InvalidInput(f"{where}: {'; '.join(_problems(error))}") from None


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        path = ".".join(str(part + 1) if isinstance(part, int) else part for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"there is no {path}"
        elif problem["type"] == "missing":
            yield f"{to_snake(path)} is missing"
        else:
            yield f"{path}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, got {problem['input']!r}"


def _words(content: dict[str, Any]) -> dict[str, Any]:
    """Turn STRATEGY_CANARY into canary. An unspecified enum is left out; for a comparison it means `auto`."""
    worded: dict[str, Any] = {}
    for name, value in content.items():
        if name in _ENUMS:
            word = value.removeprefix(f"{_ENUMS[name]}_").lower()
            if word != "unspecified":
                worded[name] = word
            elif name == "comparison":
                worded[name] = _AUTO
        else:
            worded[name] = _words(value) if isinstance(value, dict) else value
    return worded


def _constants(content: dict[str, Any]) -> dict[str, Any]:
    """Undo `_words`."""
    constants: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            constants[name] = _constants(value)
        elif name in _ENUMS:
            constants[name] = f"{_ENUMS[name]}_{'UNSPECIFIED' if value == _AUTO else value.upper()}"
        else:
            constants[name] = value
    return constants


def _absent(part: type[_Part]) -> dict[str, Any]:
    return {to_camel(name): None for name in part.model_fields if name not in {"offline_gate", "confidence"}}


def _capitalised(content: dict[str, Any]) -> dict[str, Any]:
    """Turn canary into Canary, as the API server spells enums."""
    return {
        name: _capitalised(value)
        if isinstance(value, dict)
        else value.capitalize()
        if to_snake(name) in _ENUMS
        else value
        for name, value in content.items()
    }


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

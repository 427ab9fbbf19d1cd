"""The rollout policy as a file: the names of registry.proto, in YAML or JSON, or in camelCase as in Kubernetes.

Fields that a file leaves out get the registry's defaults, and the registry validates the values.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

import yaml
from google.protobuf import json_format
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
)
from pydantic.alias_generators import to_camel, to_snake
from pydantic_core import PydanticCustomError

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import InvalidInput
from updraft_cli.output import flat
from updraft_rollouts.terms import Comparison, OnInconclusive, Strategy, Term

_Count = Annotated[int, Field(ge=0, le=2**32 - 1)]

_UNLIMITED = ("maxPodsSwapping", "revisionHistoryMegabytes")
"""Fields whose 0 is no limit in a registry, as their absence is in Kubernetes."""

_PROTO, _KUBERNETES = "proto", "kubernetes"
"""Where a policy is read from or written to; without one, a file or JSON."""


def _term(kind: type[Term]) -> BeforeValidator:
    """Read a term from a word in any case, or from its number on the wire."""

    def read_term(value: Any, info: ValidationInfo) -> Term | None:
        if info.context == _PROTO:
            return kind.from_proto(value)
        if value is None:
            return None
        for term in kind:
            if str(value).lower() == term.lower():
                return term
        *words, last = (f"'{term.lower()}'" for term in kind)
        raise PydanticCustomError("enum", f"input should be {', '.join(words)} or {last}")

    return BeforeValidator(read_term)


def _written(term: Term, info: SerializationInfo) -> str | int:
    if info.context == _PROTO:
        return term.to_proto()
    return term.value if info.context == _KUBERNETES else term.lower()


_Term = PlainSerializer(_written, when_used="unless-none")


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, validate_by_name=True, validate_by_alias=True
    )


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
    max_domain_regression_percent: _Count | None = None
    on_inconclusive: Annotated[OnInconclusive | None, _term(OnInconclusive), _Term] = None
    dry_run: bool | None = None
    confidence: float | None = None
    comparison: Annotated[Comparison | None, _term(Comparison), _Term] = None
    switchback_seconds: _Count | None = None


class OfflineGate(_Part):
    """Settings of the gate on held-out requests."""

    min_samples: _Count | None = None
    min_gain_percent: float | None = None
    confidence: float | None = None


class Policy(_Part):
    """See registry.proto for the meaning of each field."""

    strategy: Annotated[Strategy | None, _term(Strategy), _Term] = None
    steps: tuple[Step, ...] | None = None
    analysis: Analysis | None = None
    auto_rollback: bool | None = None
    progress_deadline_seconds: _Count | None = None
    max_pods_swapping: _Count | None = None
    revision_history_limit: _Count | None = None
    revision_history_megabytes: _Count | None = None
    offline_gate: OfflineGate | None = None

    @classmethod
    def from_proto(cls, message: pb.RolloutPolicy) -> Self:
        """Return the policy that a registry has in force."""
        content = json_format.MessageToDict(
            message,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
            use_integers_for_enums=True,
        )
        return cls.model_validate(content, context=_PROTO)

    @classmethod
    def from_kubernetes(cls, fields: Mapping[str, Any]) -> Self:
        """Return the policy in spec.rollout; fields of a newer CRD are ignored, and InvalidInput names its new values."""
        try:
            return cls.model_validate(fields, extra="ignore")
        except ValidationError as error:
            problems = "; ".join(_problems(error))
            raise InvalidInput(f"spec.rollout is of another version of Updraft: {problems}") from None

    def to_proto(self) -> pb.RolloutPolicy:
        return json_format.ParseDict(self._dump(_PROTO), pb.RolloutPolicy())

    def plain(self) -> dict[str, Any]:
        return self._dump()

    def kubernetes_fields(self, *, is_whole: bool = False) -> dict[str, Any]:
        """Return it as a merge patch of spec.rollout; a whole one removes the fields that it leaves out."""
        fields = self._dump(_KUBERNETES, by_alias=True)
        fields |= {name: None for name in _UNLIMITED if fields.get(name) == 0}
        if is_whole:
            analysis = _absent(Analysis) | fields.get("analysis", {})
            fields = _absent(Policy) | fields | {"analysis": analysis}
        return fields

    def _dump(self, context: str | None = None, *, by_alias: bool = False) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, mode="json", context=context, by_alias=by_alias)

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
        old, new = dict(flat(before.plain())), dict(flat(self.plain()))
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


def _absent(part: type[_Part]) -> dict[str, Any]:
    return {to_camel(name): None for name in part.model_fields if name not in {"offline_gate", "confidence"}}

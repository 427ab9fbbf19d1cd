"""What all models of the API share: camelCase on the wire, and rules that only the API server can check (CEL).

A rule is written beside the fields it is about, in `model_config["json_schema_extra"]`, and goes into the CRD as it is.
Only what the API server has let in is read by these models, so an unknown field is no error here: a newer CRD may
know more than this operator.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
QUANTITY = r"^[1-9][0-9]*(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?$"

Text = Annotated[str, Field(max_length=1024)]

Count = Annotated[int, Field(ge=0, le=1_000_000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Percent = Annotated[int, Field(ge=0, le=100)]
Seconds = Annotated[int, Field(ge=0, le=2_592_000)]
"""At most a month: whoever writes more has mistaken the unit."""

Quantity = Annotated[str, Field(pattern=QUANTITY, max_length=32)]
"""An amount of bytes as Kubernetes writes it, never none."""

IntOrPercent = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^[0-9]{1,3}%$", max_length=4)],
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
"""A count, or a share such as "25%"."""

Untyped = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
"""A part of another kind's schema, which would make the CRD a megabyte: the API server checks it where it ends up."""

UntypedList = Annotated[
    list[
        Annotated[
            dict[str, Any],
            Field(
                json_schema_extra={
                    "x-kubernetes-preserve-unknown-fields": True,
                    "required": ["name"],
                    "properties": {"name": {"type": "string", "minLength": 1}},
                }
            ),
        ]
    ],
    Field(
        max_length=128,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    ),
]
"""Such parts, told apart by their names."""


class Model(BaseModel):
    """Base of all parts: frozen, named as in Kubernetes, described by the docstrings below the fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )


def rules(*rules: tuple[str, str], **more: Any) -> dict[str, Any]:
    """CEL rules, each with its message, for `json_schema_extra`; `more` is further schema."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules], **more}


def immutable(field: str, why: str) -> dict[str, Any]:
    """The rule that a field keeps its first value."""
    return {
        "rule": f"self.{field} == oldSelf.{field}",
        "message": f"{field} is immutable: {why}",
        "reason": "FieldValueForbidden",
        "fieldPath": f".{field}",
    }


def same(field: str) -> str:
    """The expression that an optional field keeps its first value, or its absence (CEL's own optionals cost too much)."""
    return f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"


def one_of(*fields: str) -> tuple[str, str]:
    """The rule that at most one of some fields is set."""
    listed = ", ".join(f"has(self.{field})" for field in fields)
    return f"[{listed}].filter(x, x).size() <= 1", f"choose one of {_said(fields)}"


def _said(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}"

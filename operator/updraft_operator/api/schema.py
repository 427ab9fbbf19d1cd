"""The base of all API models: camelCase on the wire, and CEL rules, which only the API server checks.

A rule stands next to its fields, in `model_config["json_schema_extra"]`, and goes into the CRD unchanged. Unknown fields
are ignored: the API server has validated the objects already, and a newer CRD may have fields that this operator lacks.
"""

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
"""At most a month, because a larger value is most likely in the wrong unit."""

Quantity = Annotated[str, Field(pattern=QUANTITY, max_length=32)]
"""A number of bytes as Kubernetes writes it, never 0."""

IntOrPercent = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^[0-9]{1,3}%$", max_length=4)],
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
"""A count, or a share such as "25%"."""

Untyped = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
"""Part of another kind's schema, whose inclusion would make the CRD a megabyte: the API server validates it in the object
that it ends up in."""

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
"""A list of such parts, keyed by name."""


class Model(BaseModel):
    """Base class: frozen, with camelCase aliases; the docstrings below the fields become descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )


def rules(*rules: tuple[str, str]) -> dict[str, Any]:
    """`json_schema_extra` with CEL rules and their messages."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


NAMES_A_CLAIM = ("!self.uri.startsWith('pvc:///')", "uri names no claim: pvc://CLAIM/FOLDER")
"""The rule that a claim in `uri` has a name."""


def immutable(field: str, why: str) -> dict[str, Any]:
    return {
        "rule": f"self.{field} == oldSelf.{field}",
        "message": f"{field} is immutable: {why}",
        "reason": "FieldValueForbidden",
        "fieldPath": f".{field}",
    }


def same(field: str) -> str:
    """The expression that an optional field never changes (CEL's own optionals cost too much)."""
    return f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"


def one_of(*fields: str) -> tuple[str, str]:
    listed = ", ".join(f"has(self.{field})" for field in fields)
    *first, last = fields
    return f"[{listed}].filter(x, x).size() <= 1", f"choose one of {', '.join(first)} and {last}"

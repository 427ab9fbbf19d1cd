"""A request for new passwords, and how far the operator is with it, by a condition of the resource."""

from dataclasses import dataclass

from updraft_chassis.errors import Conflict
from updraft_cli.backends.objects import GROUP, Json

ROTATE = f"{GROUP}/rotate"
"""Annotation with the request."""

_CONDITION = "PasswordsRotated"
_UNNOTICED = "the operator has not noticed the request yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """How far one request is."""

    speculator: str
    namespace: str
    request: str
    is_done: bool
    message: str


def rotation_of(content: Json) -> Rotation:
    """Read it from an AdaptiveSpeculator. A later request replaces this one, and its passwords are as new. Conflict if the
    request is not there any more."""
    conditions = content.get("status", {}).get("conditions", ())
    found = next((each for each in conditions if each["type"] == _CONDITION), {"status": "", "message": ""})
    asked = content["metadata"].get("annotations", {}).get(ROTATE)
    if asked is None:
        raise Conflict(
            f"somebody removed the request, the annotation {ROTATE}, perhaps before the operator completed it: "
            "let your tools keep it, and ask again"
        )
    prefix = f"request {asked}: "
    is_about_it = found["message"].startswith(prefix)
    return Rotation(
        speculator=content["metadata"]["name"],
        namespace=content["metadata"]["namespace"],
        request=asked,
        is_done=is_about_it and found["status"] == "True",
        message=found["message"].removeprefix(prefix) if is_about_it else _UNNOTICED,
    )

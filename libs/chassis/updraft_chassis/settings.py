"""Settings from the environment, read once in `__main__` and frozen.

A bad environment prints all problems at once, one line each, and the process exits with 2. An unknown variable with the
part's prefix is a problem too: a typo must not silently select the default. A Settings object built in code takes nothing
from the environment. Rejected: files, and reading variables where they are used.
"""

import difflib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import Field, SecretBytes, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

S = TypeVar("S", bound="Settings")


NAME = r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?"
"""Pattern of names that become part of stream keys, folders, label values and Kubernetes names."""

Name = Annotated[str, Field(pattern=f"^{NAME}$")]
"""Name of a speculator or a namespace."""

StreamNamespace = Annotated[str, Field(pattern=f"^({NAME}:)?{NAME}$")]
"""Start of stream keys: a namespace, or an installation's ID and a namespace."""


class Settings(BaseSettings):
    """Base of a process's settings.

    A subclass sets `model_config = SettingsConfigDict(env_prefix="UPDRAFT_<PART>_")` (the rest is inherited), keeps
    its fields flat, and puts a docstring below each field: the settings reference is generated from them.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword arguments only: `load` is the single reader of the environment."""
        return (init_settings,)


def load(cls: type[S], environ: Mapping[str, str] | None = None) -> S:
    """Read `cls` from `environ` (default: `os.environ`); print all problems and exit with 2 if there are any."""
    environ = os.environ if environ is None else environ
    problems = list(_unknown(cls, environ))
    try:
        settings = cls(**_values(cls, environ))
    except ValidationError as error:
        problems = [_sentence(cls, detail) for detail in error.errors()] + problems
    else:
        if not problems:
            return settings
    print("\n".join(problems), file=sys.stderr)  # noqa: T201 - logs are not set up yet
    raise SystemExit(2)


def variable(cls: type[Settings], field: str) -> str:
    """The environment variable of a field, such as "UPDRAFT_REGISTRY_PORT" for "port"."""
    return f"{cls.model_config['env_prefix']}{field}".upper()


def _values(cls: type[Settings], environ: Mapping[str, str]) -> dict[str, Any]:
    source = EnvSettingsSource(cls)
    source.env_vars = {name.lower(): value for name, value in environ.items()}
    return source()


def _unknown(cls: type[Settings], environ: Mapping[str, str]) -> Iterator[str]:
    known = [variable(cls, field) for field in cls.model_fields]
    prefix = variable(cls, "")
    for name in sorted(environ):
        if name.upper().startswith(prefix) and name.upper() not in known:
            (closest,) = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
            yield f"{name}: no such setting; the closest is {closest}{_hint(environ[name])}"


def _sentence(cls: type[Settings], detail: ErrorDetails) -> str:
    if not detail["loc"]:  # a check over several fields: its input is the whole environment, which is never printed
        return f"{variable(cls, '').rstrip('_')}: {detail['msg']}"
    field = str(detail["loc"][0])
    name = variable(cls, field)
    if detail["type"] == "missing":
        return f"{name}: required, but not set"
    if field in cls.model_fields and _is_secret(cls.model_fields[field].annotation):
        return f"{name}: {detail['msg']} (the value is secret)"
    return f"{name}: {detail['msg']}; got {detail['input']!r}{_hint(detail['input'])}"


def _hint(value: object) -> str:
    # Kubernetes sets NAME_PORT=tcp://... in every pod for every Service, and our Services are named like our settings.
    is_service_link = isinstance(value, str) and value.startswith("tcp://")
    return " (a Kubernetes service link? set enableServiceLinks: false in the pod)" if is_service_link else ""


def _is_secret(annotation: object) -> bool:
    return annotation in {SecretStr, SecretBytes} or any(_is_secret(part) for part in get_args(annotation))

"""Renders chat messages to a prompt with the chat template of the model.

The template is code from a model folder, so it runs in jinja's sandbox. It gets the names that Hugging Face defines and
no others, so that the prompt equals the one that `transformers` builds.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from updraft_chassis.errors import InvalidInput

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """Renders a conversation up to the point where the assistant continues."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidInput(f"the chat template is not valid jinja2: {error}") from error

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """The template of a model folder: chat_template.jinja, else tokenizer_config.json, else None."""
        path = folder / "tokenizer_config.json"
        config = _read_object(path) if path.is_file() else {}
        own_file = folder / "chat_template.jinja"
        source = own_file.read_text() if own_file.is_file() else _default_template(config.get("chat_template"))
        return None if source is None else cls(source, _special_tokens(config))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt. Raises InvalidInput with the error of the template if it rejects the conversation."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidInput(f"the model's chat template rejects these messages: {error}") from error


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; in a prompt it has no effect."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may pass it by this name
    return datetime.now().astimezone().strftime(format)


def _default_template(declared: object) -> str | None:
    """tokenizer_config.json contains one template, or several by name."""
    if isinstance(declared, list):
        by_name = {entry["name"]: entry["template"] for entry in declared}
        declared = by_name.get("default")
    return declared if isinstance(declared, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """A special token is a string, or an object with its content."""
    declared = {name: config.get(name) for name in _SPECIAL_TOKENS}
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in declared.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"{path} does not contain a JSON object")
    return content

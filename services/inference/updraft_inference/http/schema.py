"""OpenAI's request bodies as data with limits.

A field that would change the answer and is not supported is rejected by name, unless its value is the default: ignoring
it silently would give a wrong answer. Fields that change nothing (user, metadata, ...) are ignored.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from updraft_inference.http.errors import ApiError, invalid

MAX_STOPS = 16
"""OpenAI allows 4; each one is searched for at every token."""
MAX_STOP_CHARS = 256
"""Text is held back while it may be the beginning of a stop string."""
MAX_LOOKAHEAD = 64
"""Longer drafts never pay off; the engine's own limit is lower."""
MAX_DOMAIN_CHARS = 64
MAX_CHOICES = 8
"""Each choice runs, and waits in the queue, as its own request."""
MAX_TOP_LOGPROBS = 20
"""OpenAI's limit for chats."""
MAX_BIASES = 1024

_ANY_OBJECT = '{"type":"object"}'

_MAX_INT64 = 2**63 - 1
_MAX_INT32 = 2**31 - 1

_OFF: tuple[object, ...] = (None, False, 0, 0.0, "", [], {})
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # Field: the values that equal our behaviour.
    "best_of": (None, 1),
    "prompt_logprobs": (None, False),
    "echo": _OFF,
    "suffix": _OFF,
    "min_tokens": _OFF,
    "tools": _OFF,
    "tool_choice": (None, "none", "auto"),
    "functions": _OFF,
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "stop_token_ids": _OFF,
    "bad_words": _OFF,
    "use_beam_search": _OFF,
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "add_generation_prompt": (None, True),
    "continue_final_message": _OFF,
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "documents": _OFF,
}


class _Body(BaseModel):
    # Strict, as at OpenAI: "0.5" is not a number and 1 is not a boolean.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class UpdraftOptions(_Body):
    """Updraft's extension: the drafter of this request, and a domain name for the trainer."""

    model_config = ConfigDict(extra="forbid")

    drafter: Literal["none", "ngram", "eagle3", "hybrid"] | None = None
    lookahead: Annotated[int, Field(ge=0, le=MAX_LOOKAHEAD)] | None = None
    domain: Annotated[str, Field(max_length=MAX_DOMAIN_CHARS)] = ""


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else [] if value is None else value


def _top_k(value: object) -> object:
    return 0 if value is None or value == -1 else value  # vLLM and SGLang use -1 for "off"


def _absent_is(*, default: object) -> BeforeValidator:
    """OpenAI's clients may send null for a default."""
    return BeforeValidator(lambda value: default if value is None else value)


def _biases(value: object) -> object:
    if not isinstance(value, dict):
        return () if value is None else value
    if not all(isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,9}", key) for key in value):
        raise ValueError("expected an object from token ids to numbers")
    return tuple((int(key), bias) for key, bias in value.items())


class _JsonSchema(_Body):
    """`strict` is always in effect; name and description only matter to models that are told the schema."""

    schema_: Annotated[dict[str, object], Field(alias="schema")]


class _ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


def _schema_text(value: object) -> object:
    """The JSON schema of a response_format, as JSON; None: any text."""
    if value is None:
        return None
    response_format = _ResponseFormat.model_validate(value)
    if response_format.type == "json_schema":
        if response_format.json_schema is None:
            raise ValueError("json_schema is required if type is json_schema")
        return json.dumps(response_format.json_schema.schema_)
    return _ANY_OBJECT if response_format.type == "json_object" else None


Limit = Annotated[int, Field(ge=1, le=_MAX_INT32)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class GenerationBody(_Body):
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = _UNSUPPORTED

    model: str
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), _absent_is(default=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2), _absent_is(default=1.0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), _absent_is(default=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=_MAX_INT32), BeforeValidator(_top_k)] = 0
    min_p: Annotated[float, Field(ge=0, le=1), _absent_is(default=0.0)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100), _absent_is(default=1.0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2), _absent_is(default=0.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2), _absent_is(default=0.0)] = 0.0
    logit_bias: Annotated[tuple[tuple[int, Bias], ...], Field(max_length=MAX_BIASES), BeforeValidator(_biases)] = ()
    response_format: Annotated[str | None, BeforeValidator(_schema_text)] = None
    """After parsing: the JSON schema of the answer, as JSON."""
    seed: Annotated[int, Field(ge=-_MAX_INT64 - 1, le=_MAX_INT64)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_stops)] = []
    stream: Annotated[bool, _absent_is(default=False)] = False
    stream_options: StreamOptions | None = None
    ignore_eos: Annotated[bool, _absent_is(default=False)] = False
    updraft: Annotated[UpdraftOptions, _absent_is(default={})] = UpdraftOptions()

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> "GenerationBody":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send only one")
        return self

    @model_validator(mode="after")
    def _a_grammar_ends(self) -> "GenerationBody":
        if self.response_format is not None and self.ignore_eos:
            raise ValueError("ignore_eos cannot be combined with response_format")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Number of alternatives to report with the log-probability of each token; None: report neither."""
        raise NotImplementedError

    @property
    def has_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _prompt(value: object) -> object:
    """One prompt, also if it is sent as a list of one."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise ValueError(f"{len(value)} prompts in one request are not supported; send one request per prompt")
        value = value[0]
    is_ids = isinstance(value, list) and all(type(token_id) is int for token_id in value)
    if not isinstance(value, str) and not is_ids:
        raise ValueError("expected text or a list of token ids")
    return value


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt` is text or token ids; `logprobs` is the number of alternatives to report."""

    unsupported = {**_UNSUPPORTED, "top_logprobs": (None, 0)}

    prompt: Annotated[str | list[int], BeforeValidator(_prompt)]
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None,
        BeforeValidator(lambda value: None if value is False else value),
    ] = None

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs


def _content(value: object) -> object:
    """Text, also if it is sent as parts."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"content parts of type {kind!r} are not supported; only text is")
        texts.append(part["text"])
    return "".join(texts)


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]

    @property
    def turn(self) -> dict[str, str]:
        """The turn for chat templates, which do not know `developer`, the new name of `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]  # a mebibyte can hold 350,000 invalid ones
    logprobs: Annotated[bool, _absent_is(default=False)] = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), _absent_is(default=0)] = 0

    @model_validator(mode="after")
    def _logprobs_first(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


B = TypeVar("B", bound=GenerationBody)


def parse(kind: type[B], raw: bytes) -> B:
    """Parse a request body. Raises ApiError 400 that names the field and the problem."""
    try:
        content = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The request body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise invalid("The request body must be a JSON object")
    _refuse_unsupported(content, kind.unsupported)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_context=False)[0]) from None


def _refuse_unsupported(content: Mapping[str, object], unsupported: Mapping[str, tuple[object, ...]]) -> None:
    for field in sorted(unsupported.keys() & content.keys()):
        value = content[field]
        # Compare types too: `best_of: true` equals 1.
        if not any(type(value) is type(same) and value == same for same in unsupported[field]):
            raise invalid(f"{field} is not supported by this server", param=field, code="unsupported_parameter")


def _refusal(detail: ErrorDetails) -> ApiError:
    message = detail["msg"].removeprefix("Value error, ")
    param = ".".join(map(str, detail["loc"])) or None
    if detail["type"] == "missing":
        return invalid(f"{param} is required", param=param, code="missing_required_parameter")
    return invalid(f"{param}: {message}" if param else message, param=param, code="invalid_value")

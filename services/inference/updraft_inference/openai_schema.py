"""What we accept of OpenAI's request bodies, as data with limits.

A field that would change the answer and that we do not honour is refused by name, unless it says what we do
anyway: silently ignoring it would be a wrong answer. Fields that change nothing (user, metadata, ...) are
ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from updraft_inference.openai_errors import ApiError, invalid

MAX_STOPS = 16
"""OpenAI allows 4; each one is searched for at every token."""
MAX_STOP_CHARS = 256
"""Text is held back for as long as it may begin a stop string."""
MAX_LOOKAHEAD = 64
"""No chain as long as this has ever paid; the engine's own limit is lower."""
MAX_DOMAIN_CHARS = 64

_MAX_INT64 = 2**63 - 1
_MAX_INT32 = 2**31 - 1

_OFF: tuple[object, ...] = (None, False, 0, 0.0, "", [], {})
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # Field: the values that mean what we do anyway.
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "prompt_logprobs": (None, False),
    "echo": _OFF,
    "suffix": _OFF,
    "presence_penalty": _OFF,
    "frequency_penalty": _OFF,
    "repetition_penalty": (None, 1, 1.0),
    "min_p": _OFF,
    "min_tokens": _OFF,
    "logit_bias": _OFF,
    "response_format": (None, {"type": "text"}),
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
    # Strict: "0.5" is no number and 1 is no boolean, as at OpenAI.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    """How the stream ends."""

    include_usage: bool = False


class UpdraftOptions(_Body):
    """Our own extension: choose the drafter of one request, and name its kind of traffic for the trainer."""

    model_config = ConfigDict(extra="forbid")

    drafter: Literal["none", "ngram", "eagle3"] | None = None
    lookahead: Annotated[int, Field(ge=0, le=MAX_LOOKAHEAD)] | None = None
    domain: Annotated[str, Field(max_length=MAX_DOMAIN_CHARS)] = ""


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else [] if value is None else value


def _top_k(value: object) -> object:
    return 0 if value is None or value == -1 else value  # -1 is how vLLM and SGLang say "off"


def _absent_is(*, default: object) -> BeforeValidator:
    """OpenAI's clients may send null for a default."""
    return BeforeValidator(lambda value: default if value is None else value)


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class GenerationBody(_Body):
    """What completions and chat completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), _absent_is(default=1.0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), _absent_is(default=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=_MAX_INT32), BeforeValidator(_top_k)] = 0
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

    @property
    def has_usage_chunk(self) -> bool:
        """The stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def _prompt(value: object) -> object:
    """One prompt, also where it comes as a list of one."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise ValueError(f"{len(value)} prompts in one request are not supported: send one request a prompt")
        value = value[0]
    is_ids = isinstance(value, list) and all(type(token_id) is int for token_id in value)
    if not isinstance(value, str) and not is_ids:
        raise ValueError("expected text or a list of token ids")
    return value


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt` is text or token ids."""

    prompt: Annotated[str | list[int], BeforeValidator(_prompt)]


def _content(value: object) -> object:
    """Text, also where it comes as parts."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"content parts of type {kind!r} are not supported, only text")
        texts.append(part["text"])
    return "".join(texts)


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates want it; they know OpenAI's newer name for `system` by the old one."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatBody":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: send one of them")
        return self


B = TypeVar("B", bound=GenerationBody)


def parse(kind: type[B], raw: bytes) -> B:
    """Read a request body; ApiError 400 that names the field and says what was expected."""
    try:
        content = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise invalid("The body must be a JSON object")
    _refuse_unsupported(content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_context=False)[0]) from None


def _refuse_unsupported(content: Mapping[str, object]) -> None:
    for field in sorted(_UNSUPPORTED.keys() & content.keys()):
        value = content[field]
        # Types too: `logprobs: 0` asks for one log-probability, and equals False.
        if not any(type(value) is type(same) and value == same for same in _UNSUPPORTED[field]):
            raise invalid(f"{field} is not supported by this server", param=field, code="unsupported_parameter")


def _refusal(detail: ErrorDetails) -> ApiError:
    message = detail["msg"].removeprefix("Value error, ")
    param = ".".join(map(str, detail["loc"])) or None
    if detail["type"] == "missing":
        return invalid(f"{param} is required", param=param, code="missing_required_parameter")
    return invalid(f"{param}: {message}" if param else message, param=param, code="invalid_value")

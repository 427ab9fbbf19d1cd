"""One request from its body to pieces of text: check it against the model, run it, cut it at a stop string.

Whoever stops reading closes the pieces, which closes the engine's generator, which frees the slot.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from updraft_chassis.errors import InvalidInput, Unavailable, UpdraftError
from updraft_inference.agent.completions import Endings
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.engine import (
    Drafter,
    Engine,
    Finished,
    FinishReason,
    GenerationRequest,
    Sampling,
    TokenLogprob,
)
from updraft_inference.http.endpoints import B, Dialect
from updraft_inference.http.errors import ApiError, api_error, invalid
from updraft_inference.http.schema import GenerationBody
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import TextStream, Tokenizer

MIN_TEMPERATURE = 1e-3
"""Below it sampling is greedy to any reader, and dividing by it would overflow."""

_SHOWN_CHARS = 200
"""Of a name that a client sent, in the refusal of it."""


class Planner(Protocol):
    """Decides about the capture of a request before it starts."""

    def __call__(self, trace_id: bytes, *, is_opted_out: bool, domain: str) -> CapturePlan:
        """The plan; a request that is opted out leaves no trace."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What serves a request."""

    model: str
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    endings: Endings
    plan: Planner


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that the engine can run: one choice of an answer."""

    id: str
    request: GenerationRequest
    plan: CapturePlan
    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some text; the last piece has a finish reason. `num_tokens` counts the output so far, `logprobs` are of new tokens."""

    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    finished: Finished | None = None


async def jobs(backend: Backend, dialect: Dialect[B], body: B, *, client: str, is_opted_out: bool) -> list[Job]:
    """Check a body against the model; one job a choice. ApiError where it cannot be served."""
    if body.model != backend.model:
        message = f"The model {body.model[:_SHOWN_CHARS]!r} does not exist: this server has {backend.model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    prompt_ids = await _prompt_ids(backend, dialect, body)
    max_tokens = _max_tokens(backend, dialect, body, len(prompt_ids))
    _check_biases(backend, body)
    if body.num_top_logprobs is not None:
        await asyncio.to_thread(_read_token_bytes, backend)

    def one(index: int) -> Job:
        trace_id = uuid.uuid4()
        plan = backend.plan(trace_id.bytes, is_opted_out=is_opted_out, domain=body.updraft.domain)
        request = GenerationRequest(
            request_id=f"{dialect.id_prefix}-{trace_id.hex}",
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            client=client,
            sampling=_sampling(body, index),
            ignore_eos=body.ignore_eos,
            drafter=None if body.updraft.drafter is None else Drafter(body.updraft.drafter),
            lookahead=body.updraft.lookahead,
            json_schema=body.response_format,
            top_logprobs=body.num_top_logprobs,
            capture=plan.wish,
        )
        return Job(id=request.request_id, request=request, plan=plan, stops=tuple(body.stop))

    return [one(index) for index in range(body.n)]


async def pieces(backend: Backend, job: Job) -> AsyncGenerator[Piece, None]:
    """Run it. Errors of the engine come as ApiError, before the first piece or, if it fails, later."""
    text = TextStream(backend.tokenizer, job.request.prompt_ids, job.stops)
    ending = backend.endings.expect(job.id, job.plan)
    try:
        async with aclosing(backend.engine.generate(job.request)) as deltas:
            async for delta in deltas:
                before = text.num_tokens
                shown = text.push(delta.token_ids)
                logprobs = delta.logprobs[: text.num_tokens - before]
                if text.is_stopped:
                    break
                if delta.finished is not None:
                    reason = delta.finished.reason
                    if reason is FinishReason.CANCELLED:  # not by us: half an answer must not look like one
                        raise Unavailable("the engine ended this request before its end")
                    said = logprobs[:-1] if reason is FinishReason.STOP else logprobs  # without the end token
                    yield _last(shown + text.flush(), text, said, delta.finished, reason)
                    return
                yield Piece(text=shown, num_tokens=text.num_tokens, logprobs=logprobs)
            ending.stop()
    except UpdraftError as error:
        backend.endings.forget(job.id)
        raise api_error(error) from error
    yield _last(shown, text, logprobs, await ending.finished(), FinishReason.STOP)


def _last(
    shown: str,
    text: TextStream,
    logprobs: tuple[TokenLogprob, ...],
    finished: Finished | None,
    reason: FinishReason,
) -> Piece:
    return Piece(
        text=shown,
        num_tokens=text.num_tokens,
        logprobs=logprobs,
        finish_reason=reason.value,
        finished=finished,
    )


async def _prompt_ids(backend: Backend, dialect: Dialect[B], body: B) -> tuple[int, ...]:
    try:
        # In a thread: a prompt of a mebibyte takes a second, in which other streams go on.
        prompt_ids = await asyncio.to_thread(dialect.prompt, body, backend)
    except InvalidInput as error:
        raise invalid(str(error), param=dialect.prompt_param) from None
    if not prompt_ids:
        raise invalid("The prompt is empty", param=dialect.prompt_param)
    vocab_size = backend.engine.info.vocab_size
    if not all(0 <= token_id < vocab_size for token_id in prompt_ids):
        raise invalid(f"A prompt token is outside the vocabulary of {vocab_size}", param=dialect.prompt_param)
    return prompt_ids


def _max_tokens(backend: Backend, dialect: Dialect[B], body: B, num_prompt: int) -> int:
    max_context = backend.engine.info.max_context
    wanted = dialect.default_max_tokens if body.most_tokens is None else body.most_tokens
    if wanted is None:
        wanted = max(1, max_context - num_prompt)
    if num_prompt + wanted > max_context:
        raise invalid(
            f"The context of this server is {max_context} tokens: the prompt has {num_prompt}, {wanted} are "
            f"asked for, {num_prompt + wanted} together",
            param=dialect.prompt_param if num_prompt >= max_context else "max_tokens",
            code="context_length_exceeded",
        )
    return wanted


def _check_biases(backend: Backend, body: GenerationBody) -> None:
    vocab_size = backend.engine.info.vocab_size
    unknown = [token_id for token_id, _ in body.logit_bias if token_id >= vocab_size]
    if unknown:
        message = f"logit_bias: token {unknown[0]} is outside the vocabulary of {vocab_size}"
        raise invalid(message, param="logit_bias", code="invalid_value")


def _read_token_bytes(backend: Backend) -> None:
    try:
        backend.tokenizer.bytes_of(0)
    except InvalidInput as error:
        raise invalid(str(error), param="logprobs") from None


def _sampling(body: GenerationBody, index: int) -> Sampling:
    """Of one choice: with a seed each has its own."""
    return Sampling(
        temperature=body.temperature if body.temperature >= MIN_TEMPERATURE else 0.0,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        seed=None if body.seed is None else (body.seed + index) % 2**64,
    )

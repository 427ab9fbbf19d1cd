"""Runs one request: checks its body against the model, generates, and cuts the text at a stop string.

Closing the returned generator closes the engine's generator, which frees the slot.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from updraft_chassis.errors import InvalidInput, Unavailable, UpdraftError
from updraft_inference.agent.completions import CompletionListeners
from updraft_inference.agent.selection import CapturePlan, CaptureTerms
from updraft_inference.engine import (
    Drafter,
    Engine,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
)
from updraft_inference.http.endpoints import B, Endpoint
from updraft_inference.http.errors import ApiError, api_error, invalid
from updraft_inference.http.schema import GenerationBody
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import TextStream, Tokenizer

MIN_TEMPERATURE = 1e-3
"""Lower temperatures are greedy for practical purposes, and dividing by them would overflow."""

_SHOWN_CHARS = 200
"""Characters of a client-supplied name that an error repeats."""


class CapturePlanner(Protocol):
    """Decides about the capture of a request before it starts. An opted-out request leaves no trace."""

    def __call__(self, trace_id: bytes, terms: CaptureTerms) -> CapturePlan: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    model: str
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    completions: CompletionListeners
    plan: CapturePlanner


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One choice of an answer, as a request that the engine can run."""

    id: str
    request: GenerationRequest
    plan: CapturePlan
    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Some text; the last chunk has a finish reason. `num_tokens` counts all output so far, `logprobs` are of the new
    tokens."""

    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    finished: FinishedRequest | None = None


async def prepare_choices(
    served: ServedModel, endpoint: Endpoint[B], body: B, *, client: str, terms: CaptureTerms
) -> list[Choice]:
    """Check a body against the model and return its choices. Raises ApiError if it cannot be served."""
    if body.model != served.model:
        message = f"The model {body.model[:_SHOWN_CHARS]!r} does not exist; this server serves {served.model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    prompt_ids = await _prompt_ids(served, endpoint, body)
    max_tokens = _max_tokens(served, endpoint, body, len(prompt_ids))
    _check_biases(served, body)
    if body.num_top_logprobs is not None:
        await asyncio.to_thread(_read_token_bytes, served)

    terms = replace(terms, domain=body.updraft.domain, is_constrained=body.response_format is not None)

    def choice(index: int) -> Choice:
        trace_id = uuid.uuid4()
        plan = served.plan(trace_id.bytes, terms)
        request = GenerationRequest(
            request_id=f"{endpoint.id_prefix}-{trace_id.hex}",
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            client=client,
            sampling=_sampling(body, index),
            ignore_eos=body.ignore_eos,
            drafter=None if body.updraft.drafter is None else Drafter(body.updraft.drafter),
            lookahead=body.updraft.lookahead,
            json_schema=body.response_format,
            top_logprobs=body.num_top_logprobs,
            capture=plan.params,
        )
        return Choice(id=request.request_id, request=request, plan=plan, stops=tuple(body.stop))

    return [choice(index) for index in range(body.n)]


async def generate(served: ServedModel, choice: Choice) -> AsyncGenerator[TextChunk, None]:
    """Run one choice. Raises ApiError for errors of the engine, before the first chunk or later."""
    text = TextStream(served.tokenizer, choice.request.prompt_ids, choice.stops)
    completion = served.completions.expect(choice.id, choice.plan)
    try:
        async with aclosing(served.engine.generate(choice.request)) as deltas:
            async for delta in deltas:
                before = text.num_tokens
                shown = text.push(delta.token_ids)
                logprobs = delta.logprobs[: text.num_tokens - before]
                if text.is_stopped:
                    break
                if delta.finished is not None:
                    reason = delta.finished.reason
                    if reason is FinishReason.CANCELLED:  # not by us: a partial answer must not look complete
                        raise Unavailable("the engine cancelled this request")
                    if reason is FinishReason.STOP:
                        logprobs = logprobs[:-1]  # the end token
                    yield TextChunk(shown + text.flush(), text.num_tokens, logprobs, reason, delta.finished)
                    return
                yield TextChunk(shown, text.num_tokens, logprobs)
            completion.stop()
    except UpdraftError as error:
        served.completions.forget(choice.id)
        raise api_error(error) from error
    yield TextChunk(shown, text.num_tokens, logprobs, FinishReason.STOP, await completion.finished())


async def _prompt_ids(served: ServedModel, endpoint: Endpoint[B], body: B) -> tuple[int, ...]:
    try:
        # In a thread, because tokenizing a mebibyte takes a second.
        prompt_ids = await asyncio.to_thread(endpoint.prompt, body, served.tokenizer, served.chat_template)
    except InvalidInput as error:
        raise invalid(str(error), param=endpoint.prompt_param) from None
    if not prompt_ids:
        raise invalid("The prompt is empty", param=endpoint.prompt_param)
    vocab_size = served.engine.info.vocab_size
    if not all(0 <= token_id < vocab_size for token_id in prompt_ids):
        raise invalid(f"A prompt token is outside the vocabulary of {vocab_size} tokens", param=endpoint.prompt_param)
    return prompt_ids


def _max_tokens(served: ServedModel, endpoint: Endpoint[B], body: B, num_prompt: int) -> int:
    max_context = served.engine.info.max_context
    wanted = endpoint.default_max_tokens if body.most_tokens is None else body.most_tokens
    if wanted is None:
        wanted = max(1, max_context - num_prompt)
    if num_prompt + wanted > max_context:
        raise invalid(
            f"This model's maximum context is {max_context} tokens, but {num_prompt + wanted} were requested "
            f"({num_prompt} in the prompt, {wanted} in the completion)",
            param=endpoint.prompt_param if num_prompt >= max_context else "max_tokens",
            code="context_length_exceeded",
        )
    return wanted


def _check_biases(served: ServedModel, body: GenerationBody) -> None:
    vocab_size = served.engine.info.vocab_size
    unknown = [token_id for token_id, _ in body.logit_bias if token_id >= vocab_size]
    if unknown:
        message = f"logit_bias: token {unknown[0]} is outside the vocabulary of {vocab_size} tokens"
        raise invalid(message, param="logit_bias", code="invalid_value")


def _read_token_bytes(served: ServedModel) -> None:
    try:
        served.tokenizer.bytes_of(0)
    except InvalidInput as error:
        raise invalid(str(error), param="logprobs") from None


def _sampling(body: GenerationBody, index: int) -> SamplingParams:
    """SamplingParams of one choice. With a seed, each choice gets its own."""
    return SamplingParams(
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

"""One request from its body to pieces of text: check it against the model, run it, cut it at a stop string.

Whoever stops reading closes the pieces, which closes the engine's generator, which frees the slot.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from updraft_chassis.errors import InvalidInput, UpdraftError
from updraft_inference.agent.selection import CapturePlan
from updraft_inference.chat import ChatTemplate
from updraft_inference.dialect import B, Dialect
from updraft_inference.endings import Endings
from updraft_inference.engine.port import Drafter, Engine, Finished, FinishReason, GenerationRequest, Sampling
from updraft_inference.openai_errors import ApiError, api_error, invalid
from updraft_inference.openai_schema import GenerationBody
from updraft_inference.text import TextStream, Tokenizer

MIN_TEMPERATURE = 1e-3
"""Below it sampling is greedy to any reader, and dividing by it would overflow."""


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
    """A request that the engine can run."""

    id: str
    request: GenerationRequest
    plan: CapturePlan
    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some text; the last piece has a finish reason. `num_tokens` counts the output so far."""

    text: str
    num_tokens: int
    finish_reason: str | None = None
    finished: Finished | None = None


async def job(backend: Backend, dialect: Dialect[B], body: B, *, is_opted_out: bool) -> Job:
    """Check a body against the model. ApiError where it cannot be served."""
    if body.model != backend.model:
        message = f"The model {body.model!r} does not exist: this server has {backend.model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    trace_id = uuid.uuid4()
    plan = backend.plan(trace_id.bytes, is_opted_out=is_opted_out, domain=body.updraft.domain)
    prompt_ids = await _prompt_ids(backend, dialect, body)
    options = body.updraft
    request = GenerationRequest(
        request_id=f"{dialect.id_prefix}-{trace_id.hex}",
        prompt_ids=prompt_ids,
        max_tokens=_max_tokens(backend, dialect, body, len(prompt_ids)),
        sampling=_sampling(body),
        ignore_eos=body.ignore_eos,
        drafter=None if options.drafter is None else Drafter(options.drafter),
        lookahead=options.lookahead,
        capture=plan.wish,
    )
    return Job(id=request.request_id, request=request, plan=plan, stops=tuple(body.stop))


async def pieces(backend: Backend, job: Job) -> AsyncGenerator[Piece, None]:
    """Run it. Errors of the engine come as ApiError, before the first piece or, if it fails, later."""
    text = TextStream(backend.tokenizer, job.request.prompt_ids, job.stops)
    ending = backend.endings.expect(job.id, job.plan)
    try:
        async with aclosing(backend.engine.generate(job.request)) as deltas:
            async for delta in deltas:
                shown = text.push(delta.token_ids)
                if text.is_stopped:
                    break
                if delta.finished is not None:
                    yield _last(shown + text.flush(), text, delta.finished, delta.finished.reason)
                    return
                yield Piece(text=shown, num_tokens=text.num_tokens)
            ending.stop()
    except UpdraftError as error:
        backend.endings.forget(job.id)
        raise api_error(error) from error
    yield _last(shown, text, await ending.finished(), FinishReason.STOP)


def _last(shown: str, text: TextStream, finished: Finished | None, reason: FinishReason) -> Piece:
    return Piece(text=shown, num_tokens=text.num_tokens, finish_reason=reason.value, finished=finished)


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
    wanted = dialect.max_tokens(body)
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


def _sampling(body: GenerationBody) -> Sampling:
    return Sampling(
        temperature=body.temperature if body.temperature >= MIN_TEMPERATURE else 0.0,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=None if body.seed is None else body.seed % 2**64,
    )

"""OpenAI's completion and chat endpoints as data: body, prompt and the shape of the answer. Pure.

`updraft` inside `usage` is the only addition to OpenAI's answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from updraft_inference.agent.counters import total
from updraft_inference.agent.counters import usage as usage_of
from updraft_inference.engine import FinishedRequest, TokenLogprob
from updraft_inference.http.errors import invalid
from updraft_inference.http.schema import ChatBody, CompletionBody, GenerationBody
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.logprobs import Json, Transcript
from updraft_inference.text.tokenization import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions; a chat may use the rest of the context."""

B = TypeVar("B", bound=GenerationBody)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint(Generic[B]):
    """One endpoint: its body, its prompt, its choices."""

    path: str
    body: type[B]
    id_prefix: str
    prompt_param: str
    prompt: Callable[[B, Tokenizer, ChatTemplate | None], tuple[int, ...]]
    default_max_tokens: int | None
    """Limit if the body has none; None: the rest of the context."""
    answer_object: str
    chunk_object: str
    choice: Callable[[str], Json]
    """The choice for a complete text; index, log-probabilities and finish reason are added to it."""
    opening: Json | None
    """The choice in the first chunk, before any text."""
    chunk_choice: Callable[[str], Json]
    logprobs: Callable[[Transcript, Sequence[TokenLogprob]], Json]


def _completion_prompt(body: CompletionBody, tokenizer: Tokenizer, _: ChatTemplate | None) -> tuple[int, ...]:
    if isinstance(body.prompt, str):
        return tokenizer.encode(body.prompt, add_special_tokens=True)
    return tuple(body.prompt)


def _chat_prompt(body: ChatBody, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> tuple[int, ...]:
    if chat_template is None:
        raise invalid("This model has no chat template; use /v1/completions", param="messages")
    prompt = chat_template.render([message.turn for message in body.messages])
    return tokenizer.encode(prompt, add_special_tokens=False)


COMPLETIONS: Endpoint[CompletionBody] = Endpoint(
    path="/v1/completions",
    body=CompletionBody,
    id_prefix="cmpl",
    prompt_param="prompt",
    prompt=_completion_prompt,
    default_max_tokens=DEFAULT_COMPLETION_TOKENS,
    answer_object="text_completion",
    chunk_object="text_completion",
    choice=lambda text: {"text": text},
    opening=None,
    chunk_choice=lambda text: {"text": text},
    logprobs=Transcript.completion,
)

CHAT: Endpoint[ChatBody] = Endpoint(
    path="/v1/chat/completions",
    body=ChatBody,
    id_prefix="chatcmpl",
    prompt_param="messages",
    prompt=_chat_prompt,
    default_max_tokens=None,
    answer_object="chat.completion",
    chunk_object="chat.completion.chunk",
    choice=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    opening={"delta": {"role": "assistant", "content": ""}},
    chunk_choice=lambda text: {"delta": {"content": text} if text else {}},
    logprobs=Transcript.chat,
)


def usage(num_prompt: int, num_output: int, finished: Sequence[FinishedRequest]) -> Json:
    """Token counts of all choices, and draft statistics of those for which the engine reported them."""
    counts: Json = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
    if not finished:
        return counts
    served = total([usage_of(choice) for choice in finished])
    draft: Json = {
        "drafter": served.drafter.value,
        "draft_version": served.draft_version,
        "verify_steps": served.verify_steps,
        "acceptance_length": served.acceptance_length,
        "proposed": served.proposed,
        "accepted": served.accepted,
    }
    return {**counts, "updraft": draft}

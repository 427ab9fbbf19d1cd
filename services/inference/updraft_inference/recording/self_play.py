"""Requests that the target makes up: it writes the user's message after its own chat template's header. Answers are greedy."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import CaptureParams, Drafter, GenerationRequest, SamplingParams
from updraft_inference.recording.recorder import Generate, Job
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer

NAME = "self-play"
MESSAGE_TOKENS, ANSWER_TOKENS = 96, 128
PROMPT_ROWS = 64
MAX_ATTEMPTS = 8
"""Messages of no text before the target counts as unable to write any."""

_MARK = "updraft-message"


class Conversation:
    """The tokens around a user's message in the model's own chat format, and the message's end."""

    def __init__(self, model: Path) -> None:
        """InvalidInput if the model has no chat template, or one that changes a message."""
        self._tokenizer, template = Tokenizer.open(model), ChatTemplate.open(model)
        if template is None:
            raise InvalidInput(f"{model} has no chat template, so nothing shows how its prompts begin")
        before, mark, after = template.render([{"role": "user", "content": _MARK}]).partition(_MARK)
        if not mark or not after:
            raise InvalidInput(f"the chat template of {model} does not show where a user's message ends")
        self.header, self.footer = (self._tokenizer.encode(text, add_special_tokens=False) for text in (before, after))

    @property
    def max_context(self) -> int:
        """Tokens of the longest request."""
        return len(self.header) + MESSAGE_TOKENS + len(self.footer) + ANSWER_TOKENS

    def message(self, token_ids: tuple[int, ...], eos: frozenset[int]) -> tuple[int, ...]:
        """Return the text before the message's end; empty if that is no text."""
        ends = {*eos, self.footer[0]}
        length = next((n for n, token in enumerate(token_ids) if token in ends), len(token_ids))
        message = token_ids[:length]
        return message if self._tokenizer.decode(message).strip() else ()


class SelfPlay:
    """Requests that a model writes, of which each has a seed of its own."""

    def __init__(self, conversation: Conversation, eos: frozenset[int]) -> None:
        self._conversation = conversation
        self._eos = eos

    def jobs(self, count: int) -> Iterator[Job]:
        return (Job(name=f"{NAME}-{n:05}", request=partial(self._request, n)) for n in range(count))

    async def _request(self, number: int, generate: Generate) -> GenerationRequest:
        conversation = self._conversation
        return GenerationRequest(
            request_id=f"{NAME}/{number}",
            prompt_ids=(*conversation.header, *await self._message(number, generate), *conversation.footer),
            max_tokens=ANSWER_TOKENS,
            sampling=SamplingParams(temperature=0.0),
            drafter=Drafter.NGRAM,
            capture=CaptureParams(payload=True, prompt_rows=PROMPT_ROWS),
        )

    async def _message(self, number: int, generate: Generate) -> tuple[int, ...]:
        for attempt in range(MAX_ATTEMPTS):
            request = GenerationRequest(
                request_id=f"{NAME}/{number}/message-{attempt}",
                prompt_ids=self._conversation.header,
                max_tokens=MESSAGE_TOKENS,
                sampling=SamplingParams(temperature=1.0, top_k=512, top_p=0.95, seed=number * MAX_ATTEMPTS + attempt),
                drafter=Drafter.NONE,
            )
            finished = await generate(request)
            if message := self._conversation.message(finished.output_ids, self._eos):
                return message
        raise InvalidInput(
            f"the model wrote no user's message in {MAX_ATTEMPTS} attempts; self-play needs a chat model"
        )

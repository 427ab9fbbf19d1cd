"""Requests that the target makes up: it writes the user's message after its own chat template's header, and answers it.

Every request is recorded in a file of its own, so an interrupted run goes on where it stopped. Answers are greedy.
"""

import asyncio
from pathlib import Path

from updraft_chassis.errors import InvalidInput, UpdraftError
from updraft_chassis.progress import Progress, Report
from updraft_draft import recordings
from updraft_inference.agent.recording import answered, recorded
from updraft_inference.engine import CaptureParams, Drafter, Engine, GenerationRequest, SamplingParams
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer

NAME = "self-play"
STREAMS = 16
"""Requests at a time."""
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
    """Records requests `0` to `count` - 1 in a folder, except those that it holds."""

    def __init__(self, engine: Engine, conversation: Conversation, folder: Path, report: Report) -> None:
        self._engine = engine
        self._conversation = conversation
        self._folder = folder
        self._report = report
        self._tokens = 0

    async def run(self, count: int) -> None:
        """Conflict if the folder is another model's, Exhausted if the disk is full. The first error stands for all."""
        recordings.clean(self._folder)
        fingerprint = self._engine.info.target_fingerprint
        missing = [n for n in range(count) if recordings.read(self._folder, n, target_fingerprint=fingerprint) is None]
        numbers, done = iter(missing), count - len(missing)
        self._report(Progress(activity="recording", done=done, total=count))

        async def work() -> None:
            nonlocal done
            for number in numbers:
                await self._record(number)
                done += 1
                self._report(Progress(activity="recording", done=done, total=count, tokens=self._tokens))

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(STREAMS):
                    tasks.create_task(work())
        except ExceptionGroup as errors:
            if not all(isinstance(error, UpdraftError) for error in errors.exceptions):
                raise  # a bug needs its traceback
            raise errors.exceptions[0] from None

    async def _record(self, number: int) -> None:
        conversation = self._conversation
        request = GenerationRequest(
            request_id=f"{NAME}/{number}",
            prompt_ids=(*conversation.header, *await self._message(number), *conversation.footer),
            max_tokens=ANSWER_TOKENS,
            sampling=SamplingParams(temperature=0.0),
            drafter=Drafter.NGRAM,
            capture=CaptureParams(payload=True, prompt_rows=PROMPT_ROWS),
        )
        finished = await answered(self._engine, request)
        self._tokens += len(finished.output_ids)
        recordings.write(self._folder, number, recorded(self._engine, finished, recorder=NAME))

    async def _message(self, number: int) -> tuple[int, ...]:
        for attempt in range(MAX_ATTEMPTS):
            request = GenerationRequest(
                request_id=f"{NAME}/{number}/message-{attempt}",
                prompt_ids=self._conversation.header,
                max_tokens=MESSAGE_TOKENS,
                sampling=SamplingParams(temperature=1.0, top_k=512, top_p=0.95, seed=number * MAX_ATTEMPTS + attempt),
                drafter=Drafter.NONE,
            )
            finished = await answered(self._engine, request)
            self._tokens += len(finished.output_ids)
            if message := self._conversation.message(finished.output_ids, self._engine.info.eos_token_ids):
                return message
        raise InvalidInput(
            f"the model wrote no user's message in {MAX_ATTEMPTS} attempts; self-play needs a chat model"
        )

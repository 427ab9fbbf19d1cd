"""Requests from a file of prompts in JSON Lines, which is read a line at a time.

A line is a record with "prompt" (a text, or messages), with "messages" as OpenAI's API has them, or with "conversations" as
ShareGPT has them. Everything after the last message of the user is dropped, because the target answers itself. Lines that hold
no such record are left out and counted.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from updraft_chassis.errors import InvalidInput
from updraft_inference.engine import CaptureParams, Drafter, GenerationRequest, SamplingParams
from updraft_inference.recording.options import AnswerOptions
from updraft_inference.recording.recorder import Generate, Job
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer

NAME = "prompt"
MAX_LINE_BYTES = 16 * 1024 * 1024
PROMPT_ROWS = 512
"""As pods capture by default."""

_ROLES = {"developer": "system", "human": "user", "gpt": "assistant"} | {r: r for r in ("system", "user", "assistant")}
"""Roles of OpenAI and ShareGPT, by their names in chat templates."""

Messages = list[dict[str, str]]


class Prompts:
    """The requests of a file. Memory grows by about 100 bytes per prompt, to notice repeated ones."""

    def __init__(self, path: Path, model: Path, options: AnswerOptions) -> None:
        self._path = path
        self._options = options
        self._tokenizer, self._template = Tokenizer.open(model), ChatTemplate.open(model)
        self._seen: set[bytes] = set()
        self._left_out: dict[str, list[int]] = {}
        """For each reason the number of lines, and the first of them."""

    def jobs(self) -> Iterator[Job | None]:
        """A job for each line; None for a line that is left out."""
        for number, line in enumerate(_lines(self._path), start=1):
            try:
                yield self._job(line) if line is None or line.strip() else None
            except InvalidInput as error:
                self._left_out.setdefault(str(error), [0, number])[0] += 1
                yield None

    def summary(self) -> str:
        """After `jobs`: a sentence about lines that were left out, or an empty string. InvalidInput if there is no prompt."""
        reasons = [f"{count:,} {reason} (first: line {line})" for reason, (count, line) in self._left_out.items()]
        if not self._seen:
            raise InvalidInput(f"{self._path} holds no prompt to answer: {'; '.join(reasons) or 'it is empty'}")
        return f"{self._path}: {len(self._seen):,} prompts; left out: {'; '.join(reasons)}." if reasons else ""

    def _job(self, line: bytes | None) -> Job:
        if line is None:
            raise InvalidInput(f"longer than {MAX_LINE_BYTES // 2**20} MiB")
        options, prompt_ids = self._options, self._ids(conversation(_record(line)))
        max_prompt = options.max_context - options.max_tokens
        if not prompt_ids:
            raise InvalidInput("without text")
        if len(prompt_ids) > max_prompt:
            raise InvalidInput(f"of more than {max_prompt:,} tokens")
        content = repr((options.max_tokens, options.temperature, options.seed)).encode()
        digest = hashlib.sha256(content + struct.pack(f"<{len(prompt_ids)}I", *prompt_ids)).digest()
        if digest[:8] in self._seen:
            raise InvalidInput("repeated")
        self._seen.add(digest[:8])
        return Job(name=f"{NAME}-{digest[:16].hex()}", request=partial(self._request, prompt_ids, digest))

    async def _request(self, prompt_ids: tuple[int, ...], digest: bytes, _: Generate) -> GenerationRequest:
        options = self._options
        return GenerationRequest(
            request_id=f"{NAME}/{digest.hex()}",
            prompt_ids=prompt_ids,
            max_tokens=options.max_tokens,
            sampling=SamplingParams(temperature=options.temperature, seed=int.from_bytes(digest[:7])),
            drafter=Drafter.NGRAM,
            capture=CaptureParams(payload=True, prompt_rows=PROMPT_ROWS),
        )

    def _ids(self, prompt: str | Messages) -> tuple[int, ...]:
        """A text is a user's message, or for a model without a chat template the beginning of what it writes."""
        has_markers = self._template is not None
        text = prompt if isinstance(prompt, str) else self._rendered(prompt)
        if isinstance(prompt, str) and has_markers:
            text = self._rendered([{"role": "user", "content": prompt}])
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character, which JSON can hold
            raise InvalidInput("not Unicode text") from None
        return self._tokenizer.encode(text, add_special_tokens=not has_markers)

    def _rendered(self, messages: Messages) -> str:
        if self._template is None:
            raise InvalidInput("with messages, for which the model has no chat template")
        try:
            return self._template.render(messages)
        except InvalidInput:
            raise InvalidInput("refused by the model's chat template") from None


def count_lines(path: Path) -> int:
    """Lines of a file, whatever it holds. InvalidInput if it cannot be read."""
    num_lines, last = 0, b"\n"
    try:
        with path.open("rb") as file:
            while block := file.read(1024 * 1024):
                num_lines, last = num_lines + block.count(b"\n"), block[-1:]
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    return num_lines + (last != b"\n")


def conversation(record: object) -> str | Messages:
    """The text of a record, or its messages up to the last one of the user. InvalidInput for something else."""
    if not isinstance(record, dict):
        raise InvalidInput("no JSON object")
    prompt = next((record[name] for name in ("prompt", "messages", "conversations") if name in record), None)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InvalidInput("without text")
        return prompt
    if not isinstance(prompt, list):
        raise InvalidInput('without "prompt", "messages" or "conversations"')
    messages = [_message(turn) for turn in prompt]
    length = max((n for n, message in enumerate(messages, start=1) if message["role"] == "user"), default=0)
    if not length:
        raise InvalidInput("without a user's message")
    return messages[:length]


def _message(turn: object) -> dict[str, str]:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), _text(turn.get("content", turn.get("value")))
        if isinstance(role, str) and role in _ROLES and content is not None:
            return {"role": _ROLES[role], "content": content}
    raise InvalidInput("with a message that is no text of system, user or assistant")


def _text(content: object) -> str | None:
    """The text of a message, also if it is in parts; None if there is something else in it."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _record(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InvalidInput("not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise InvalidInput("not JSON") from None


def _lines(path: Path) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) < MAX_LINE_BYTES:
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield None

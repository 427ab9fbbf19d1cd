"""Converts text to tokens and back, one token at a time: only complete characters, and never past a stop string.

The text does not depend on how many tokens a step emits, so a draft cannot change it. Not used:
`tokenizers.DecodeStream`, which has no flush and panics on some byte sequences.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import llguidance
import tokenizers

from updraft_chassis.errors import InvalidInput

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A decoder may treat the first token specially (for example, strip its space), so new tokens are decoded after a few old
# ones.
_CONTEXT_TOKENS = 6

# A character has at most 4 bytes, so at most 4 tokens. A longer undecodable run will never become a character.
_MAX_HELD_TOKENS = 8


class Tokenizer:
    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read tokenizer.json in `folder`. Raises InvalidInput if it is missing or damaged."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidInput(f"the model folder {folder} has no tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
        except Exception as error:  # noqa: BLE001 - tokenizers raises no other class
            raise InvalidInput(f"{path} is not a tokenizer: {error}") from None

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Tokenize `text`. Chat templates write special tokens themselves; do not add them then."""
        # As a batch of one, because `encode` holds the GIL and would block all other threads.
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character. The first call reads the vocabulary and is slow.

        Raises InvalidInput if the tokenizer has no byte representation.
        """
        return self._vocabulary.decode_bytes([token_id])

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        try:
            return llguidance.LLTokenizer(self._tokenizer.to_str())
        except ValueError as error:
            raise InvalidInput(f"log-probabilities are not available for this model's tokenizer: {error}") from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens; incomplete characters become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class Detokenizer:
    """Converts the tokens after a prompt to text, holding back each character until all its bytes are known."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = _context(tokenizer, prompt_ids)
        self._num_shown = len(self._ids)

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The remaining text, without a final character that the end of the request cut off."""
        text = self._new_text().rstrip(_REPLACEMENT)
        self._num_shown = len(self._ids)
        return text

    def _push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._new_text()
        if not text:  # a special token; a run of them must not grow the window
            self._ids.pop()
            return ""
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._num_shown < _MAX_HELD_TOKENS:
            return ""
        # The text just shown is the next context. It starts at a character, as byte-level decoders need.
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._num_shown])
        return self._tokenizer.decode(self._ids)[len(shown) :]


def _context(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The end of the prompt, beginning at the start of a character."""
    ids = list(prompt_ids[-_CONTEXT_TOKENS:])
    while tokenizer.decode(ids).startswith(_REPLACEMENT):
        ids.pop(0)
    return ids


class StopStrings:
    """Passes text through up to the first complete stop string, and holds back text that may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """The text that is safe to show; nothing more once a stop string was found."""
        if self.is_found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.is_found = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        return self._release(len(self._held) - self._num_doubtful())

    def flush(self) -> str:
        """The text that was held back, at the end of the request."""
        return self._release(len(self._held))

    def _release(self, num_chars: int) -> str:
        shown, self._held = self._held[:num_chars], self._held[num_chars:]
        return shown

    def _num_doubtful(self) -> int:
        """Length of the longest suffix of the held text that is the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for num_chars in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-num_chars:]
            if any(stop.startswith(end) for stop in self._stops):
                return num_chars
        return 0


class TextStream:
    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)
        self.num_tokens = 0

    @property
    def is_stopped(self) -> bool:
        return self._stops.is_found

    def push(self, token_ids: Iterable[int]) -> str:
        """Text to show now. Tokens after the one that completes a stop string are neither read nor counted."""
        shown = ""
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            shown += self._stops.push(self._detokenizer.push([token_id]))
        return shown

    def flush(self) -> str:
        if self.is_stopped:
            return ""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()

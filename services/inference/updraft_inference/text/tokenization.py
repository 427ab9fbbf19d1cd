"""Text to tokens and back, a token at a time: whole characters only, and never past a stop string.

What a client reads does not depend on how many tokens a step emitted: pushing tokens singly or in groups
gives the same text, so a draft cannot change it. Refused: `tokenizers.DecodeStream` (no flush, and it panics
on some byte sequences).
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import llguidance
import tokenizers

from updraft_chassis.errors import InvalidInput

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A decoder may treat the first token specially (strip its space), so the text of new tokens is what they add
# to a few old ones.
_CONTEXT_TOKENS = 6

# A character is at most 4 bytes, so at most 4 tokens; what is undecodable for longer is garbage, and waiting
# cannot mend it.
_MAX_HELD_TOKENS = 8


class Tokenizer:
    """The tokenizer of a model folder (tokenizer.json)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read `folder`/tokenizer.json; InvalidInput if it is absent."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidInput(f"the model folder {folder} holds no tokenizer.json")
        return cls(tokenizers.Tokenizer.from_str(path.read_text()))

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The tokens of `text`. A chat template writes the special ones itself: then do not add them."""
        # As a batch of one: `encode` would hold the interpreter's lock, and all other threads, for as long as it takes.
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that one token stands for, also where they are half a character. The first call is slow: it reads the
        vocabulary. InvalidInput for a tokenizer that cannot tell."""
        return self._vocabulary.decode_bytes([token_id])

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        try:
            return llguidance.LLTokenizer(self._tokenizer.to_str())
        except ValueError as error:
            raise InvalidInput(f"the bytes of this model's tokens cannot be told: {error}") from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens; incomplete characters become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class Detokenizer:
    """Turns the tokens after a prompt into text, holding back a character until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = _context(tokenizer, prompt_ids)
        self._num_shown = len(self._ids)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is complete with these tokens."""
        return "".join([self._push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The rest, without a character at the very end that the end of the request cut off."""
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
        # The piece just shown is the next context: it starts where a character starts, as decoders of byte
        # runs need.
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._num_shown])
        return self._tokenizer.decode(self._ids)[len(shown) :]


def _context(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The end of the prompt, from the start of a character on."""
    ids = list(prompt_ids[-_CONTEXT_TOKENS:])
    while tokenizer.decode(ids).startswith(_REPLACEMENT):
        ids.pop(0)
    return ids


class StopStrings:
    """Lets text through up to the stop string that is complete first; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show; nothing more once a stop string was found."""
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
        """What was held back, when no more text comes."""
        return self._release(len(self._held))

    def _release(self, num_chars: int) -> str:
        shown, self._held = self._held[:num_chars], self._held[num_chars:]
        return shown

    def _num_doubtful(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for num_chars in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-num_chars:]
            if any(stop.startswith(end) for stop in self._stops):
                return num_chars
        return 0


class TextStream:
    """Tokens of one request to text that a client may see."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._detokeniser = Detokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)
        self.num_tokens = 0

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: no more text will come."""
        return self._stops.is_found

    def push(self, token_ids: Iterable[int]) -> str:
        """Text to show now. Tokens after the one that completes a stop string are not read, not counted."""
        shown = ""
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            shown += self._stops.push(self._detokeniser.push([token_id]))
        return shown

    def flush(self) -> str:
        """The rest, at the end of the request."""
        if self.is_stopped:
            return ""
        return self._stops.push(self._detokeniser.flush()) + self._stops.flush()

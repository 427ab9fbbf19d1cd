"""Output that follows a JSON schema: which tokens each row of a verify forward allows. llguidance provides the grammar.

A row's mask is the one after the drafts before it; afterwards the matcher is rolled back to the end of the output. A draft
that the grammar forbids is verified, not cut off. Its probability is 0, so it is rejected by the same rule that makes the
output exact; cutting it off and sampling from p instead would not be exact. End tokens are allowed where the text may end,
and the matcher never reads them.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import llguidance
import torch
from torch import Tensor

from updraft_chassis.errors import InvalidInput

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,24}"
"""Bounded, or a model that emits nothing but blanks would never end. Room for a line break and a deep indentation."""


class _FailureError(Exception):
    """The matcher cannot continue."""


class Grammar:
    """One request's grammar, at the end of its output. Not thread-safe."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, eos: frozenset[int]) -> None:
        self.failure: InvalidInput | None = None
        """The grammar allows no text, or exceeds what llguidance computes per step. The request then ends."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = eos
        self._num_read = 0

    def allowed(self, output_ids: Sequence[int], draft_ids: Sequence[int]) -> Tensor:
        """Tokens allowed at each row, bool [len(draft_ids) + 1, V], on the CPU; at least one per row.

        `output_ids` extends that of the last call. Rows after a draft that ends the output, or that is not allowed, are
        never reached and allow everything.
        """
        rows = torch.ones(len(draft_ids) + 1, self._vocab_size, dtype=torch.bool)
        try:
            self._read(output_ids)
            self._fill(rows, draft_ids)
        except _FailureError as error:
            self.failure = _refusal(error)
        return rows

    def _fill(self, rows: Tensor, draft_ids: Sequence[int]) -> None:
        rows[0] = self._mask()
        num_ahead = 0
        for row, token in enumerate(draft_ids, start=1):
            if token in self._eos or not self._matcher.try_consume_tokens([token]):
                break
            num_ahead = row
            rows[row] = self._mask()
        if num_ahead and not self._matcher.rollback(num_ahead):
            raise _FailureError(self._matcher.get_error())

    def _read(self, output_ids: Sequence[int]) -> None:
        """Follow the output, which was allowed."""
        new = [token for token in output_ids[self._num_read :] if token not in self._eos]
        self._num_read = len(output_ids)
        if self._matcher.try_consume_tokens(new) != len(new):
            raise _FailureError(self._matcher.get_error() or "the output has left the grammar")

    def _mask(self) -> Tensor:
        """Bool [V], unpacked from the matcher's bit mask."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        mask = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: self._vocab_size].bool()
        error = self._matcher.get_error() if self._matcher.is_error() else ""
        if error.startswith("NoExtension") or not (error or mask.any()):
            raise _FailureError("no text continues from here")
        if error:
            raise _FailureError(error)
        return mask


class Grammars:
    """Compiles grammars for one model's tokens. The vocabulary is read on first use, because few requests need it."""

    def __init__(self, model: Path, vocab_size: int, eos: frozenset[int]) -> None:
        self._path = model / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos = eos
        self._lock = threading.Lock()
        self._tokens: llguidance.LLTokenizer | None = None

    def of_json_schema(self, schema: str) -> Grammar:
        """Compile a JSON schema, which takes up to a second. InvalidInput, with the reason, if that is not possible."""
        tokens = self._vocabulary()
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": _WHITESPACE}
            )
        except ValueError as error:
            raise _refusal(error) from None
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return Grammar(matcher, self._vocab_size, self._eos)

    def _vocabulary(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokens is None:
                self._tokens = self._read()
            return self._tokens

    def _read(self) -> llguidance.LLTokenizer:
        if not self._path.is_file():
            raise InvalidInput(f"a JSON schema needs the model's tokenizer, and there is no {self._path}")
        try:
            return llguidance.LLTokenizer(str(self._path), n_vocab=self._vocab_size, eos_token=sorted(self._eos))
        except ValueError as error:
            raise InvalidInput(f"llguidance cannot read the tokenizer {self._path}: {error}") from None


def _refusal(reason: object) -> InvalidInput:
    """In one line: the first line of the reason, and the last, which is where a regular expression's parser explains."""
    lines = str(reason).partition("<state>")[0].strip().splitlines() or ["no reason given"]
    reason_line = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return InvalidInput(f"response_format: this JSON schema cannot be followed: {reason_line[:300]}")

"""Output that follows a JSON schema: which tokens each row of a verify forward may be. The grammar itself is llguidance's.

A row's mask is the one after the drafts before it; the matcher then goes back to where the output is. A draft that the
grammar forbids is not cut but verified: its probability is 0, so it is refused, and that its drafter might have proposed
it stays part of the rule that makes the output exact (cutting it and drawing from p instead would not be exact).
End tokens are the grammar's end: allowed where the text may end, and never read by the matcher.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import llguidance
import torch
from torch import Tensor

from updraft_chassis.errors import InvalidInput

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,24}"
"""Bounded, or a model that says nothing but blanks would never end. Room for a line break and a deep indentation."""


class _FailureError(Exception):
    """The matcher cannot go on."""


class Grammar:
    """One request's grammar, at the end of its output. Not thread-safe."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, eos: frozenset[int]) -> None:
        self.failure: InvalidInput | None = None
        """The grammar has no text, or is beyond what llguidance computes in a step: the request has to end."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = eos
        self._num_read = 0

    def allowed(self, output_ids: Sequence[int], draft_ids: Sequence[int]) -> Tensor:
        """Tokens that may stand at each row, bool [len(draft_ids) + 1, V], on the CPU; at least one in every row.

        `output_ids` is what it was at the last call, and more. Rows after a draft that ends the output, or that is not
        allowed, are never reached, and allow everything.
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
        """Follow the output. What was chosen was allowed."""
        new = [token for token in output_ids[self._num_read :] if token not in self._eos]
        self._num_read = len(output_ids)
        if self._matcher.try_consume_tokens(new) != len(new):
            raise _FailureError(self._matcher.get_error() or "the output has left the grammar")

    def _mask(self) -> Tensor:
        """Bool [V]: one bit a token in the matcher's words."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        mask = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: self._vocab_size].bool()
        error = self._matcher.get_error() if self._matcher.is_error() else ""
        if error.startswith("NoExtension") or not (error or mask.any()):
            raise _FailureError("no text goes on from here")
        if error:
            raise _FailureError(error)
        return mask


class Grammars:
    """Makes grammars over one model's tokens. The vocabulary is read when the first is asked for: few requests need it."""

    def __init__(self, model: Path, vocab_size: int, eos: frozenset[int]) -> None:
        self._path = model / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos = eos
        self._lock = threading.Lock()
        self._tokens: llguidance.LLTokenizer | None = None

    def of_json_schema(self, schema: str) -> Grammar:
        """The grammar of a schema's texts; takes up to a second. InvalidInput, with the reason, if it cannot be followed."""
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
    """In one line: the first, and the last of what a regular expression's parser says, which is the reason."""
    lines = str(reason).partition("<state>")[0].strip().splitlines() or ["no reason given"]
    told = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return InvalidInput(f"response_format: this JSON schema cannot be followed: {told[:300]}")

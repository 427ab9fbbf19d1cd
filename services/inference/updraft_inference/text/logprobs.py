"""Log-probabilities in OpenAI's two formats.

There is an entry for every token of the answer, including those of a stop string but not the end token. A token may be
part of a character: its text then contains U+FFFD, and `bytes` of a chat has the exact bytes.
"""

import codecs
from collections.abc import Callable, Sequence

from updraft_inference.engine import TokenLogprob

_LEAST = -9999.0
"""OpenAI and vLLM use this for "never", because JSON has no infinity."""

Json = dict[str, object]


class Transcript:
    """The log-probabilities of one choice, token by token. `bytes_of` returns the bytes of a token."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def chat(self, tokens: Sequence[TokenLogprob]) -> Json:
        """`logprobs` of a choice or chunk of a chat."""
        content = [
            {
                **self._entry(token.token_id, token.log_prob),
                "top_logprobs": [self._entry(token_id, log_prob) for token_id, log_prob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def completion(self, tokens: Sequence[TokenLogprob]) -> Json:
        """`logprobs` of a choice or chunk of a completion. `text_offset` counts characters of the completion."""
        return {
            "text_offset": [self._offset(token.token_id) for token in tokens],
            "tokens": [self._text(token.token_id) for token in tokens],
            "token_logprobs": [max(token.log_prob, _LEAST) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
        }

    def _likeliest(self, token: TokenLogprob) -> dict[str, float]:
        """By text; if several tokens have the same text, the likeliest one."""
        likeliest: dict[str, float] = {}
        for token_id, log_prob in token.top:
            likeliest.setdefault(self._text(token_id), max(log_prob, _LEAST))
        return likeliest

    def _entry(self, token_id: int, log_prob: float) -> Json:
        raw = self._bytes_of(token_id)
        return {"token": self._text(token_id), "logprob": max(log_prob, _LEAST), "bytes": list(raw)}

    def _text(self, token_id: int) -> str:
        return self._bytes_of(token_id).decode(errors="replace")

    def _offset(self, token_id: int) -> int:
        """Complete characters before this token."""
        before = self._num_chars
        self._num_chars += len(self._decoder.decode(self._bytes_of(token_id)))
        return before

"""Prompts with the same beginning are computed once: a new request copies the rows that a slot still holds.

Keys and values depend only on the tokens up to their position, so the rows of a common prefix are valid for the new request.
They are copied once, or stay where they are: copying moves bytes where computing would cost a forward.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from updraft_inference.torch_engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrefix:
    """The rows of a client's request in a slot: the target's of the first `num_computed_tokens` tokens, and the draft's of the
    first `num_computed_draft_tokens`."""

    slot: int
    client: str
    ids: list[int]
    num_computed_tokens: int
    num_computed_draft_tokens: int


class PrefixMatch(NamedTuple):
    """`length` positions can be copied from a slot."""

    slot: int = -1
    length: int = 0


def cached_prefix(sequence: Sequence) -> CachedPrefix:
    """The rows in a sequence's slot that other requests can copy."""
    return CachedPrefix(
        slot=sequence.slot,
        client=sequence.request.client,
        ids=sequence.ids,
        num_computed_tokens=sequence.num_computed_tokens,
        num_computed_draft_tokens=0 if sequence.has_old_draft_rows else sequence.num_computed_draft_tokens,
    )


def longest(prompt: list[int], prefixes: Iterable[CachedPrefix], *, most: int, with_draft: bool) -> PrefixMatch:
    """The longest prefix of a prompt that is cached, at most `most` tokens.

    `with_draft`: the draft's rows are needed too. Its row of a position has also read the next token, and it continues from
    the first state that the target computes for the new request.
    """
    best = PrefixMatch()
    for prefix in prefixes:
        num = prefix.num_computed_tokens
        length = min(most, num, prefix.num_computed_draft_tokens) if with_draft else min(most, num)
        if length > best.length:
            common = common_length(prompt, prefix.ids)
            length = min(length, common - 1 if with_draft else common)
        if length > best.length:
            best = PrefixMatch(prefix.slot, length)
    return best


def common_length(a: list[int], b: list[int]) -> int:
    """Length of the common beginning. By halving, because comparing slices is fast and a loop is not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

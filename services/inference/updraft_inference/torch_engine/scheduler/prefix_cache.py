"""Prompts that begin alike are read once: what a slot still holds of an earlier or running request is taken over.

Keys and values depend on nothing but the tokens up to their position, so those of a common prefix are the new request's too.
They are copied once, into a slot beside those in use, or stay where they are: that moves bytes where reading would compute.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrefix:
    """Rows of a client's request that a slot holds: the target's of the first `num_computed_tokens` tokens, and the draft's of
    the first `num_computed_draft_tokens`."""

    slot: int
    client: str
    ids: list[int]
    num_computed_tokens: int
    num_computed_draft_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """`length` positions can be taken over from a slot."""

    slot: int = -1
    length: int = 0


def longest(prompt: list[int], tenants: Iterable[CachedPrefix], *, most: int, with_draft: bool) -> PrefixMatch:
    """The longest prefix of a prompt that is held, at most `most` tokens.

    `with_draft`: what the draft holds counts as well. Its row of a position also read the token after it, and it reads on
    from the first state that the target computes anew.
    """
    best = PrefixMatch()
    for tenant in tenants:
        held = (
            min(tenant.num_computed_tokens, tenant.num_computed_draft_tokens)
            if with_draft
            else tenant.num_computed_tokens
        )
        length = min(most, held)
        if length > best.length:
            common = common_length(prompt, tenant.ids)
            length = min(length, common - 1 if with_draft else common)
        if length > best.length:
            best = PrefixMatch(tenant.slot, length)
    return best


def common_length(a: list[int], b: list[int]) -> int:
    """Tokens that two lists begin with alike; by halving, for comparing slices is fast and a loop is not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

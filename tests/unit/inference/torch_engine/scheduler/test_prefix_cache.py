"""A prompt takes over what was read of the same beginning, and never more."""

from hypothesis import given
from hypothesis import strategies as st

from updraft_inference.torch_engine.scheduler.prefix_cache import CachedPrefix, PrefixMatch, common_length, longest

texts = st.lists(st.integers(0, 1), max_size=24)
tenants = st.lists(st.tuples(texts, st.integers(0, 24), st.integers(0, 24)), max_size=4).map(
    lambda all_of: [
        CachedPrefix(
            slot=slot,
            client="",
            ids=ids,
            num_computed_tokens=min(read, len(ids)),
            num_computed_draft_tokens=min(drafted, read, len(ids)),
        )
        for slot, (ids, read, drafted) in enumerate(all_of)
    ]
)


@given(texts, texts)
def test_the_common_length_is_where_two_texts_part(a: list[int], b: list[int]) -> None:
    n = common_length(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]


@given(prompt=texts, held=tenants, most=st.integers(-3, 24), with_draft=st.booleans())
def test_what_is_taken_over_was_read_of_the_same_tokens(
    prompt: list[int], held: list[CachedPrefix], most: int, *, with_draft: bool
) -> None:
    match = longest(prompt, held, most=most, with_draft=with_draft)
    assert match.length <= max(0, most)
    if match.length:
        tenant = held[match.slot]
        assert prompt[: match.length] == tenant.ids[: match.length]
        assert match.length <= tenant.num_computed_tokens
        if with_draft:  # the draft's last row read the token after it
            assert match.length <= tenant.num_computed_draft_tokens
            assert prompt[: match.length + 1] == tenant.ids[: match.length + 1]


@given(texts, tenants)
def test_no_longer_one_is_held(prompt: list[int], held: list[CachedPrefix]) -> None:
    match = longest(prompt, held, most=24, with_draft=False)
    assert match.length == max((min(t.num_computed_tokens, common_length(prompt, t.ids)) for t in held), default=0)
    assert (match == PrefixMatch()) == (match.length == 0)

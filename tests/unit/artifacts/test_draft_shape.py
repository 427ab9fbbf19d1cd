import pytest
from hypothesis import given
from hypothesis import strategies as st

from updraft_artifacts.draft_shape import (
    MAX_DEFAULT_VOCAB,
    MIN_DEFAULT_VOCAB,
    DraftShape,
    ShapeChoice,
    default_vocab_size,
)
from updraft_chassis.errors import InvalidInput

DEFAULT = DraftShape(num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=12288, vocab_size=32_000)


@pytest.mark.parametrize(
    ("target", "sizes", "expected"),
    [
        ("SmolLM2-135M", (49_152, 576, 9, 3, 64, 1536), 8192),
        ("SmolLM2-360M", (49_152, 960, 15, 5, 64, 2560), 14_336),
        ("Llama 3.2 1B", (128_256, 2048, 32, 8, 64, 8192), 32_000),
        ("Qwen3-8B", (151_936, 4096, 32, 8, 128, 12_288), 32_000),
        ("Qwen3-Coder-Next", (151_936, 2048, 16, 2, 256, 6144), 32_000),
        ("MiniMax-M2", (200_064, 3072, 48, 8, 128, 9216), 32_000),
        ("a target of 20,000 tokens", (20_000, 4096, 32, 8, 128, 12_288), 20_000),
    ],
)
def test_a_draft_proposes_from_as_many_tokens_as_its_target_makes_cheap(
    target: str, sizes: tuple[int, ...], expected: int
) -> None:
    names = ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    assert default_vocab_size(**dict(zip(names, sizes, strict=True))) == expected, target


_SIZE = st.integers(1, 2**16)


@given(vocab=st.integers(1, 2**20), hidden=_SIZE, heads=_SIZE, intermediate=_SIZE)
def test_the_default_never_outgrows_the_target_and_grows_with_the_draft(
    vocab: int, hidden: int, heads: int, intermediate: int
) -> None:
    def size(intermediate_size: int) -> int:
        return default_vocab_size(
            vocab_size=vocab,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=1,
            head_dim=64,
            intermediate_size=intermediate_size,
        )

    assert min(vocab, MIN_DEFAULT_VOCAB) <= size(intermediate) <= min(vocab, MAX_DEFAULT_VOCAB)
    assert size(intermediate) <= size(2 * intermediate)


def test_what_is_not_chosen_stays_the_targets() -> None:
    assert ShapeChoice().of(DEFAULT, 151_936) == DEFAULT
    chosen = ShapeChoice(draft_num_key_value_heads=4, draft_intermediate_size=4096, draft_vocab_size=10**6)
    assert chosen.of(DEFAULT, 151_936) == DraftShape(
        num_heads=32, num_kv_heads=4, head_dim=128, intermediate_size=4096, vocab_size=151_936
    )


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidInput, match="12 attention heads do not divide into 8 key-value heads"):
        ShapeChoice(draft_num_attention_heads=12).of(DEFAULT, 151_936)

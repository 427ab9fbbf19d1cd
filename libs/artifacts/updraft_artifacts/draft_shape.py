"""The sizes of a draft: the defaults for a target, and what a user chose instead.

A draft is as wide as its target, whose embedding it shares and whose head its own is made of. Everything else is free.
"""

from dataclasses import asdict, dataclass, replace

from updraft_chassis.errors import InvalidInput

MIN_DEFAULT_VOCAB, MAX_DEFAULT_VOCAB = 8192, 32_000
"""Bounds of the default. Published drafts for targets of 128,000 and more tokens propose from 32,000."""

MIN_VOCAB = 16
"""No smaller vocabulary can be chosen."""

_STEP = 1024
_NUM_STATES = 3
"""A draft reads the states of so many layers of the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape:
    """Sizes of a draft's only layer and of its vocabulary."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeChoice:
    """The sizes that a user chose for new drafts; None: the target's default. See the settings of the same names."""

    draft_num_attention_heads: int | None = None
    draft_num_key_value_heads: int | None = None
    draft_intermediate_size: int | None = None
    draft_vocab_size: int | None = None

    def of(self, default: DraftShape, vocab_size: int) -> DraftShape:
        """The shape for a target with this default and vocabulary. InvalidInput if the heads do not divide."""
        names = {"draft_num_attention_heads": "num_heads", "draft_num_key_value_heads": "num_kv_heads"}
        chosen = {
            names.get(name, name.removeprefix("draft_")): size
            for name, size in asdict(self).items()
            if size is not None
        }
        shape = replace(default, **chosen)
        if shape.num_heads % shape.num_kv_heads:
            raise InvalidInput(
                f"a draft's {shape.num_heads} attention heads do not divide into {shape.num_kv_heads} key-value heads"
            )
        return replace(shape, vocab_size=min(shape.vocab_size, vocab_size))


def default_vocab_size(
    *, vocab_size: int, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, intermediate_size: int
) -> int:
    """As many tokens as the rest of the draft has rows of its width, so that its head is at most half of a draft step.

    That is 8,192 for a target of 135M parameters, of whose 49,152 tokens more gain nothing, and 32,000 from about 1B on.
    """
    attention = (3 * num_heads + 4 * num_kv_heads) * head_dim
    rows = _NUM_STATES * hidden_size + attention + 3 * intermediate_size
    return min(vocab_size, MAX_DEFAULT_VOCAB, max(MIN_DEFAULT_VOCAB, rows // _STEP * _STEP))

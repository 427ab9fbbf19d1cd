"""Where the three tensors of a target are that a draft shares with it: embedding, head and final norm.

Families name them differently and put them below different prefixes, so they are found by the end of their names. Tensors of
layers (a number in the name) and of other networks in the same checkpoint are skipped: multi-token prediction, vision, audio,
and what projects their outputs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from updraft_artifacts.safetensors_header import TensorSpan
from updraft_chassis.errors import InvalidInput

EMBEDDING = (
    "embed_tokens.weight", "tok_embeddings.weight", "word_embeddings.weight", "embeddings.weight", "embed.weight",
    "embed_in.weight", "wte.weight",
)  # fmt: skip
HEAD = ("lm_head.weight", "unembed.weight", "output_layer.weight", "embed_out.weight", "output.weight", "head.weight")
FINAL_NORM = (
    "norm.weight", "norm_f.weight", "final_layernorm.weight", "final_layer_norm.weight", "ln_f.weight",
    "embedding_norm.weight",
)  # fmt: skip

FLOATS = ("BF16", "F16", "F32")
"""Quantised checkpoints keep the three tensors in one of these."""

_OTHER_NETWORK = re.compile(
    r"vision|visual|vit|image|video|audio|speech|projector|adapter|connector|merger|mtp|talker|code2wav"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """A tensor's name, and the weight file of the checkpoint that holds it."""

    name: str
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlaces:
    """`head` is None if the checkpoint ties it to the embedding."""

    embedding: TensorPlace
    head: TensorPlace | None
    final_norm: TensorPlace

    @property
    def all(self) -> tuple[TensorPlace, ...]:
        return (self.embedding, *([self.head] if self.head is not None else []), self.final_norm)


def find(files: Mapping[str, str], *, is_tied: bool | None) -> HeadPlaces:
    """Find the tensors in `files`, which maps names of tensors to files; `is_tied` is what config.json says (None: nothing).

    InvalidInput names what is missing, or what cannot be told apart.
    """
    embedding, norm = _find(files, EMBEDDING), _find(files, FINAL_NORM)
    head = None if is_tied else _find(files, HEAD)
    sought = {"embedding": (embedding, EMBEDDING), "final norm": (norm, FINAL_NORM)}
    if is_tied is False:
        sought["head"] = (head, HEAD)
    if not is_tied and head is None and (packed := _packed_head(files)):
        raise InvalidInput(f"its head is stored as {packed}; supported is a tensor of {', '.join(FLOATS)}")
    missing = [f"{what} ({', '.join(aliases)})" for what, (place, aliases) in sought.items() if place is None]
    if missing or embedding is None or norm is None:
        raise InvalidInput(f"its weights lack the {' and the '.join(missing)}, below any prefix")
    return HeadPlaces(embedding=embedding, head=head, final_norm=norm)


def check(places: HeadPlaces, spans: Mapping[str, TensorSpan], *, vocab_size: int, hidden_size: int) -> None:
    """Raise InvalidInput unless the tensors have the sizes of config.json and a dtype in `FLOATS`.

    Embedding and head may have more rows than the vocabulary has tokens: padding, of which both have the same.
    """
    for place in places.all:
        span = spans[place.name]
        if span.dtype not in FLOATS:
            raise InvalidInput(f"{place.name} is {span.dtype}; supported are {', '.join(FLOATS)}")
    for table in filter(None, (places.embedding, places.head)):
        shape = spans[table.name].shape
        if len(shape) != 2 or shape[0] < vocab_size or shape[1] != hidden_size:
            raise InvalidInput(
                f"{table.name} has shape {list(shape)}, config.json requires [{vocab_size}, {hidden_size}]"
            )
    norm = spans[places.final_norm.name].shape
    if norm != (hidden_size,):
        raise InvalidInput(f"{places.final_norm.name} has shape {list(norm)}, config.json requires [{hidden_size}]")
    if places.head is not None:
        rows = [spans[place.name].shape[0] for place in (places.embedding, places.head)]
        if rows[0] != rows[1]:
            raise InvalidInput(f"its embedding has {rows[0]} tokens and its head {rows[1]}")


def _find(files: Mapping[str, str], aliases: Iterable[str]) -> TensorPlace | None:
    for alias in aliases:
        found = [name for name in files if (name == alias or name.endswith(f".{alias}")) and _is_outer(name)]
        if len(found) > 1:
            raise InvalidInput(f"its weights have several tensors that may be meant by {alias}: {', '.join(found[:5])}")
        if found:
            return TensorPlace(name=found[0], file=files[found[0]])
    return None


def _packed_head(files: Iterable[str]) -> str | None:
    """The name of a tensor of a head that has no plain weight, such as `lm_head.qweight`."""
    stems = {alias.removesuffix(".weight") for alias in HEAD}
    return next((name for name in files if _is_outer(name) and not stems.isdisjoint(name.split(".")[:-1])), None)


def _is_outer(name: str) -> bool:
    """Whether the tensor belongs to no layer and to no other network of the checkpoint."""
    return not any(part.isdecimal() or _OTHER_NETWORK.search(part) for part in name.split("."))

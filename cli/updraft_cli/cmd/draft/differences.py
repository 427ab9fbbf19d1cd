"""What tells two versions apart: their documents field by field, and their weights tensor by tensor."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from updraft_cli import output
from updraft_cli.backends.drafts import Details, Tensor

_PARTS = ("manifest", "provenance", "evaluation", "traffic", "config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One fact about both, in words; empty where one of them lacks it."""

    part: str
    """One of `_PARTS`."""
    name: str
    old: str
    new: str

    @property
    def is_equal(self) -> bool:
        """Whether it tells nothing apart."""
        return self.old == self.new


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPair:
    """A tensor of both, or of one of them."""

    name: str
    old: Tensor | None
    new: Tensor | None

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same bytes."""
        return self.old == self.new


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Version `new` against version `old`, with all that is equal too."""

    speculator: str
    old: int
    new: int
    fields: tuple[Field, ...]
    tensors: tuple[TensorPair, ...]

    @property
    def are_weights_equal(self) -> bool:
        """Whether both have the same tensors."""
        return all(pair.is_equal for pair in self.tensors)


def difference(old: Details, new: Details) -> Difference:
    """Compare two versions of a speculator."""
    before, after = dict(_facts(old)), dict(_facts(new))
    return Difference(
        speculator=new.speculator,
        old=old.draft.version,
        new=new.draft.version,
        fields=tuple(
            Field(part=part, name=name, old=before.get((part, name), ""), new=after.get((part, name), ""))
            for part, name in _ordered(before, after)
        ),
        tensors=_pairs(old.tensors, new.tensors),
    )


def _facts(details: Details) -> Iterator[tuple[tuple[str, str], str]]:
    draft, provenance = details.draft, details.provenance
    yield ("manifest", "phase"), draft.phase
    yield ("manifest", "source"), draft.source
    yield ("manifest", "parent"), str(draft.parent or "none")
    yield ("manifest", "published"), output.moment(draft.published)
    yield ("manifest", "size"), output.size(draft.size_bytes)
    yield ("manifest", "weights"), draft.digest
    yield ("manifest", "tensors"), details.tensors_digest
    yield ("manifest", "target"), details.target_fingerprint
    yield ("manifest", "tokenizer"), details.tokenizer_fingerprint
    yield ("manifest", "vocabulary"), details.draft_vocabulary_fingerprint
    yield ("provenance", "samples"), str(draft.samples)
    yield ("provenance", "step"), str(draft.step)
    yield ("provenance", "first trace"), provenance.first_trace
    yield ("provenance", "last trace"), provenance.last_trace
    yield ("provenance", "trainer's settings"), provenance.config_digest
    yield ("provenance", "code"), provenance.code_version
    if (evaluation := details.evaluation) is not None:
        yield ("evaluation", "requests"), str(evaluation.requests)
        yield ("evaluation", "tokens a step"), f"{evaluation.candidate_length:.2f}"
        against = f"version {evaluation.baseline_version}" if evaluation.baseline_version else "no draft"
        yield ("evaluation", "against"), f"{evaluation.baseline_length:.2f} with {against}"
        yield ("evaluation", "drafts a step"), f"up to {evaluation.lookahead}"
    if draft.acceptance is not None:
        yield ("traffic", "tokens a step"), f"{draft.acceptance.length:.2f}"
        yield ("traffic", "accepted by position"), output.percents(draft.acceptance.by_position)
    for name, value in _flat(json.loads(details.config or "{}")):
        yield ("config", name), value


def _ordered(before: dict[tuple[str, str], str], after: dict[tuple[str, str], str]) -> list[tuple[str, str]]:
    """All keys, part by part, in the order in which they were told."""
    return sorted(dict.fromkeys((*before, *after)), key=lambda key: _PARTS.index(key[0]))


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value)


def _pairs(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[TensorPair, ...]:
    before, after = ({tensor.name: tensor for tensor in tensors} for tensors in (old, new))
    names = dict.fromkeys((*before, *after))
    return tuple(TensorPair(name=name, old=before.get(name), new=after.get(name)) for name in names)

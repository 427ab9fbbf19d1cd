"""The differences between two versions: their documents field by field, and their weights tensor by tensor."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from updraft_cli import output
from updraft_cli.backends.drafts import DraftDetails, Tensor

_PARTS = ("manifest", "provenance", "evaluation", "traffic", "config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One fact about both, in words; empty if one of them lacks it."""

    part: str
    """One of `_PARTS`."""
    name: str
    old: str
    new: str

    @property
    def is_equal(self) -> bool:
        return self.old == self.new


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPair:
    """A tensor of both, or of one of them."""

    name: str
    old: Tensor | None
    new: Tensor | None

    @property
    def is_equal(self) -> bool:
        return self.old == self.new


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Version `new` against version `old`, with what is equal too."""

    speculator: str
    old: int
    new: int
    fields: tuple[Field, ...]
    tensors: tuple[TensorPair, ...]


def difference(old: DraftDetails, new: DraftDetails) -> Difference:
    before, after = dict(_facts(old)), dict(_facts(new))
    return Difference(
        speculator=new.speculator,
        old=old.draft.version or 0,
        new=new.draft.version or 0,
        fields=tuple(
            Field(part=part, name=name, old=before.get((part, name), ""), new=after.get((part, name), ""))
            for part, name in _ordered(before, after)
        ),
        tensors=_pairs(old.tensors, new.tensors),
    )


def _facts(details: DraftDetails) -> Iterator[tuple[tuple[str, str], str]]:
    draft = details.draft
    yield ("manifest", "phase"), draft.phase
    yield ("manifest", "source"), draft.source
    yield ("manifest", "parent"), str(draft.parent or "none")
    yield ("manifest", "published"), output.timestamp(draft.published) if draft.published else ""
    yield ("manifest", "size"), "" if draft.size_bytes is None else output.size(draft.size_bytes)
    yield ("manifest", "weights"), draft.digest
    yield ("manifest", "tensors"), details.tensors_digest
    yield ("manifest", "target"), details.target_fingerprint
    yield ("manifest", "tokenizer"), details.tokenizer_fingerprint
    yield ("manifest", "vocabulary"), details.draft_vocabulary_fingerprint
    yield ("provenance", "samples"), "" if draft.samples is None else str(draft.samples)
    yield ("provenance", "step"), "" if draft.step is None else str(draft.step)
    if (provenance := details.provenance) is not None:
        yield ("provenance", "first trace"), provenance.first_trace
        yield ("provenance", "last trace"), provenance.last_trace
        yield ("provenance", "trainer settings"), provenance.config_digest
        yield ("provenance", "code"), provenance.code_version
    if (evaluation := details.evaluation) is not None:
        yield ("evaluation", "requests"), str(evaluation.requests)
        yield ("evaluation", "tokens per step"), f"{evaluation.candidate_length:.2f}"
        baseline = f"version {evaluation.baseline_version}" if evaluation.baseline_version else "no draft"
        yield ("evaluation", "baseline"), f"{evaluation.baseline_length:.2f} with {baseline}"
        yield ("evaluation", "draft tokens per step"), f"up to {evaluation.lookahead}"
    if draft.acceptance is not None:
        yield ("traffic", "tokens per step"), f"{draft.acceptance.length:.2f}"
        if draft.acceptance.by_position:
            yield ("traffic", "accepted by position"), output.percents(draft.acceptance.by_position)
    for name, value in output.flat(json.loads(details.config or "{}")):
        yield ("config", name), json.dumps(value)


def _ordered(before: dict[tuple[str, str], str], after: dict[tuple[str, str], str]) -> list[tuple[str, str]]:
    """All keys, part by part, in their order of appearance."""
    return sorted(dict.fromkeys((*before, *after)), key=lambda key: _PARTS.index(key[0]))


def _pairs(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[TensorPair, ...]:
    before, after = ({tensor.name: tensor for tensor in tensors} for tensors in (old, new))
    names = dict.fromkeys((*before, *after))
    return tuple(TensorPair(name=name, old=before.get(name), new=after.get(name)) for name in names)

"""The versions of a speculator, one of them with all its facts, and the difference of two."""

from collections.abc import Iterator
from dataclasses import dataclass

from updraft_cli import output
from updraft_cli.backends.differences import Difference
from updraft_cli.backends.drafts import Draft, DraftDetails, OfflineEvaluation, Provenance
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.ui.views import parts
from updraft_cli.ui.views.history import history_table
from updraft_cli.ui.views.lineage import Lineage, lineage
from updraft_cli.ui.views.parts import Cell, Fact, Notice, Table

_MAX_CONFIG = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    notices: tuple[Notice, ...]
    """Imports that are no version yet."""
    lineage: Lineage
    table: Table
    numbers: tuple[int, ...]
    """Newest first, for the form that compares two."""
    old: int
    new: int
    """The two that the form suggests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    number: int
    phase: Cell
    reason: str
    facts: tuple[Fact, ...]
    offline: tuple[Fact, ...]
    live: tuple[Fact, ...]
    positions: tuple[float, ...]
    """Share of accepted draft tokens by position, in percent."""
    history: Table
    tensors: Table | None
    config: str
    parent: int
    """0: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    old: int
    new: int
    fields: Table
    tensors: Table | None
    summary: str


def versions(one: SpeculatorSnapshot) -> Versions:
    numbers = tuple(draft.version for draft in one.drafts)
    new = numbers[0] if numbers else 0
    stable = one.speculator.stable
    old = stable if stable and stable != new else numbers[1] if len(numbers) > 1 else new
    notices = tuple(
        Notice(text=output.sentence(each.text), kind="bad" if each.has_failed else "warn") for each in one.imports
    )
    return Versions(notices=notices, lineage=lineage(one.drafts), table=_table(one), numbers=numbers, old=old, new=new)


def version(details: DraftDetails) -> Version:
    draft = details.draft
    acceptance = draft.acceptance
    return Version(
        number=draft.version,
        phase=parts.phase(draft.phase),
        reason=output.sentence(draft.reason),
        facts=tuple(_facts(details)),
        offline=tuple(_offline(details.evaluation)),
        live=tuple(_live(draft)),
        positions=tuple(round(100 * share, 1) for share in acceptance.by_position) if acceptance else (),
        history=history_table(details.speculator, details.history, has_version=False),
        tensors=_tensors(details) if details.tensors else None,
        config=details.config[:_MAX_CONFIG],
        parent=draft.parent or 0,
    )


def diff(difference: Difference) -> Diff:
    fields = [
        (
            Cell(text=field.name if field.part == "manifest" else f"{field.name} ({field.part})"),
            _value(field.old),
            _value(field.new),
        )
        for field in difference.fields
        if not field.is_equal
    ]
    columns = ("fact", f"version {difference.old}", f"version {difference.new}")
    differing = [pair for pair in difference.tensors if not pair.is_equal]
    tensors = [
        (
            Cell(text=pair.name, css="mono"),
            *(parts.digest(tensor.digest if tensor else "") for tensor in (pair.old, pair.new)),
        )
        for pair in differing
    ]
    num_all = len(difference.tensors)
    equal = f"All {num_all} tensors are equal: the same weights." if num_all and not differing else ""
    some = (
        f"{len(differing)} of {output.count(num_all, 'tensor')} {'differs' if num_all == 1 else 'differ'}."
        if differing
        else ""
    )
    return Diff(
        old=difference.old,
        new=difference.new,
        fields=parts.table(columns, fields, caption="What differs", empty="No difference is known."),
        tensors=parts.table(("tensor", *columns[1:]), tensors, caption="Weights") if tensors else None,
        summary=equal or some,
    )


def _value(text: str) -> Cell:
    return parts.digest(text) if text.startswith("sha256:") else Cell(text=text or parts.NONE)


def _table(one: SpeculatorSnapshot) -> Table:
    has_pods = any(draft.pods_wanted is not None for draft in one.drafts)
    columns = (
        "version",
        "phase",
        ">tokens per step",
        ">parent",
        ">samples",
        *((">loaded",) if has_pods else ()),
        "published (UTC)",
        "reason",
    )
    return parts.table(
        columns,
        [tuple(_row(one.name, draft, has_pods=has_pods)) for draft in one.drafts],
        caption="All versions, newest first",
        empty="There are no versions yet.",
    )


def _row(name: str, draft: Draft, *, has_pods: bool) -> Iterator[Cell]:
    number = draft.version
    yield Cell(text=str(number or draft.object), href=f"/s/{name}/versions/{number}" if number else "")
    marks = ", ".join(filter(None, (draft.phase, "pinned" if draft.pinned else "", "kept" if draft.retained else "")))
    yield Cell(text=marks or parts.NONE, tag=(draft.phase or "none").replace(" ", "-"))
    yield Cell(text=parts.length(parts.known(draft.acceptance)), css="num")
    yield parts.count(draft.parent or None)
    yield parts.count(draft.samples or None)
    if has_pods:
        yield Cell(text=f"{draft.pods_loaded or 0}/{draft.pods_wanted or 0}", css="num")
    yield Cell(text=output.timestamp(draft.published) if draft.published else parts.NONE, css="mono")
    yield Cell(text=draft.reason)


def _facts(details: DraftDetails) -> Iterator[Fact]:
    draft = details.draft
    texts = {
        "published": f"{output.timestamp(draft.published)} UTC" if draft.published else "",
        "source": draft.source,
        "trained": parts.training(draft),
        **(_origin(details.provenance) if details.provenance else {}),
        "size": "" if draft.size_bytes is None else output.size(draft.size_bytes),
        "loaded": "" if draft.pods_wanted is None else f"on {draft.pods_loaded or 0} of {draft.pods_wanted} pods",
    }
    yield from (parts.fact(name, text) for name, text in texts.items() if text)
    digests = {
        "weights": draft.digest,
        "tensors": details.tensors_digest,
        "target": details.target_fingerprint,
        "tokenizer": details.tokenizer_fingerprint,
        "vocabulary": details.draft_vocabulary_fingerprint,
        "trainer settings": details.provenance.config_digest if details.provenance else "",
    }
    yield from (Fact(name=name, value=parts.digest(value)) for name, value in digests.items() if value)


def _origin(provenance: Provenance) -> dict[str, str]:
    rate = f", then learning at {provenance.learning_rate:g}" if provenance.learning_rate else ""
    return {
        "origin": f"{provenance.origin}{rate}" if provenance.origin else "",
        "first trace": provenance.first_trace,
        "last trace": provenance.last_trace,
        "code": provenance.code_version,
    }


def _offline(evaluation: OfflineEvaluation | None) -> Iterator[Fact]:
    if evaluation is None:
        return
    gain = 100 * (evaluation.candidate_length / evaluation.baseline_length - 1)
    yield parts.fact("this version", f"{evaluation.candidate_length:.2f} tokens per step")
    yield parts.fact(
        parts.version_name(evaluation.baseline_version), f"{evaluation.baseline_length:.2f} tokens per step"
    )
    yield parts.fact("gain", f"{gain:+.1f} %")
    yield parts.fact(
        "from", f"{output.count(evaluation.requests, 'held-out request')}, up to {evaluation.lookahead} draft tokens"
    )


def _live(draft: Draft) -> Iterator[Fact]:
    if (acceptance := draft.acceptance) is None:
        return
    yield parts.fact("acceptance length", f"{acceptance.length:.2f} tokens per step")
    if acceptance.verify_steps:
        yield parts.fact("from", output.count(acceptance.verify_steps, "verify step"))


def _tensors(details: DraftDetails) -> Table:
    rows = [
        (
            Cell(text=tensor.name, css="mono"),
            Cell(text=tensor.dtype),
            Cell(text=" x ".join(map(str, tensor.shape)) or "scalar"),
            parts.digest(tensor.digest),
        )
        for tensor in details.tensors
    ]
    return parts.table(("tensor", "type", "shape", "digest"), rows)

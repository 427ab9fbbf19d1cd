"""Draft versions on a terminal."""

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.drafts import Acceptance, Details, Draft, History, Listing, OfflineEvaluation, Tensor

if TYPE_CHECKING:
    from updraft_cli.models.importing import Imported

_PHASE_STYLES = {
    "stable": "bold green",
    "canary": "bold yellow",
    "rejected": "red",
    "failed": "red",
    "rolled back": "red",
    "superseded": "dim",
}


def rendered_list(listing: Listing, now: datetime, *, is_wide: bool) -> RenderableType:
    """All versions: narrow enough for a terminal, or with everything that a row can hold."""
    if not listing.drafts:
        return f"No drafts of {listing.speculator} yet. {output.sentence(listing.message)}".rstrip()
    return _wide_table(listing) if is_wide else _narrow_table(listing, now)


def rendered_details(details: Details, now: datetime, *, is_wide: bool) -> RenderableType:
    """One version; wide, with all digests whole."""
    parts: list[RenderableType] = [output.facts(_facts(details, now, is_wide=is_wide)), ""]
    parts += [rendered_history(History(speculator=details.speculator, events=details.history), is_wide=False), ""]
    return Group(*parts, _tensors(details.tensors, is_wide=is_wide))


def rendered_history(history: History, *, is_wide: bool) -> RenderableType:
    """What happened, oldest first; wide, with the version and the phase before."""
    if not history.events:
        return f"Nothing has happened to {history.speculator} yet."
    columns = ("time (UTC)", ">version", "was", "became", "by", "why")
    left_out = () if is_wide else _single(history)
    table = output.table(*(column for column in columns if column not in left_out))
    for event in history.events:
        cells: dict[str, str | Text] = {
            "time (UTC)": output.moment(event.time),
            ">version": str(event.version or "-"),
            "was": Text(event.before or "-", "dim"),
            "became": phase(event.phase) if event.phase else Text("-"),
            "by": event.actor,
            "why": event.reason,
        }
        table.add_row(*(cell for column, cell in cells.items() if column not in left_out))
    return table


def rendered_import(imported: "Imported", *, is_wide: bool) -> RenderableType:
    """What an import became, and what follows; the same in all widths."""
    draft = imported.draft
    if imported.existed:
        return (
            f"{imported.speculator} had these weights already: version {draft.version}, {draft.phase}: {draft.reason}"
        )
    told = Text(f"Imported as version {draft.version} of {imported.speculator}, ") + phase(draft.phase)
    more = "" if draft.reason in imported.message else f": {draft.reason}"
    return told + f"{more}. {output.sentence(imported.message)}"


def phase(name: str, *remarks: str) -> Text:
    """Return a phase in its colour, and what else is to be said of it."""
    return Text(", ".join((name, *filter(None, remarks))), _PHASE_STYLES.get(name, ""))


def length(acceptance: Acceptance | None) -> str:
    """Return the acceptance length, tokens a verify step."""
    return f"{acceptance.length:.2f}" if acceptance else "-"


def _single(history: History) -> tuple[str, ...]:
    """Columns that say nothing: of one version, its number, and the phase before is the line before."""
    is_single = len({event.version for event in history.events}) == 1
    return (">version", "was") if is_single else ("was",)


def _narrow_table(listing: Listing, now: datetime) -> Table:
    table = output.table(">version", "phase", ">accepted", "published", "reason")
    for draft in listing.drafts:
        table.add_row(
            str(draft.version),
            _phase(draft, listing),
            length(draft.acceptance),
            output.ago(draft.published, now),
            output.cut(draft.reason),
        )
    return table


def _wide_table(listing: Listing) -> Table:
    columns = (">samples", ">step", ">size", "source", "digest", "published (UTC)", "reason")
    table = output.table(">version", "phase", ">accepted", "by position", ">parent", *columns)
    for draft in listing.drafts:
        table.add_row(
            str(draft.version),
            _phase(draft, listing),
            length(draft.acceptance),
            output.percents(draft.acceptance.by_position if draft.acceptance else ()),
            str(draft.parent or "-"),
            str(draft.samples),
            str(draft.step),
            output.size(draft.size_bytes),
            draft.source,
            output.short(draft.digest),
            output.moment(draft.published),
            draft.reason,
        )
    return table


def _phase(draft: Draft, listing: Listing) -> Text:
    is_pinned = draft.version == listing.pinned
    return phase(draft.phase, "pinned" if is_pinned else "", "retained" if draft.retained else "")


def _facts(details: Details, now: datetime, *, is_wide: bool) -> Iterator[tuple[str, str | Text]]:
    draft, digest = details.draft, str if is_wide else output.short
    yield "version", f"{draft.version} of {details.speculator}"
    retained = "; kept whatever retention says" if draft.retained else ""
    yield "phase", phase(draft.phase) + f" since {output.moment(draft.since)} UTC{retained}"
    yield "reason", draft.reason
    code = f", code {details.provenance.code_version}" if details.provenance.code_version else ""
    when = f"{output.moment(draft.published)} UTC ({output.ago(draft.published, now)})"
    yield "published", f"{when}, source {draft.source}{code}"
    yield "trained", _training(draft)
    yield "offline", offline(details.evaluation)
    yield "live", _live(draft.acceptance)
    yield "weights", f"{output.size(draft.size_bytes)}, {digest(draft.digest)}"
    yield "tensors", digest(details.tensors_digest)
    yield "target", digest(details.target_fingerprint)
    yield "tokenizer", digest(details.tokenizer_fingerprint) or "not said"
    yield "vocabulary", digest(details.draft_vocabulary_fingerprint)


def _training(draft: Draft) -> str:
    origin = (
        f"from version {draft.parent}" if draft.parent else "from scratch" if draft.source == "trainer" else "elsewhere"
    )
    return f"{origin}, {output.count(draft.samples, 'sample')}, step {draft.step}" if draft.samples else origin


def offline(evaluation: OfflineEvaluation | None) -> str:
    """Return the trainer's comparison in words."""
    if evaluation is None:
        return "not evaluated"
    baseline = f"version {evaluation.baseline_version}" if evaluation.baseline_version else "no draft"
    return (
        f"{evaluation.candidate_length:.2f} tokens a step, {evaluation.baseline_length:.2f} with {baseline}"
        f" ({evaluation.requests} held-out requests, up to {evaluation.lookahead} drafts)"
    )


def _live(acceptance: Acceptance | None) -> str:
    if acceptance is None:
        return "not served by the pods that are connected now"
    return (
        f"{acceptance.length:.2f} tokens a step over {output.count(acceptance.verify_steps, 'step')};"
        f" accepted by position: {output.percents(acceptance.by_position)}"
    )


def _tensors(tensors: tuple[Tensor, ...], *, is_wide: bool) -> Table:
    table = output.table("tensor", "type", "shape", "digest")
    for tensor in tensors:
        digest = tensor.digest if is_wide else output.short(tensor.digest)
        table.add_row(tensor.name, tensor.dtype, shape(tensor), digest)
    return table


def shape(tensor: Tensor) -> str:
    """Return `32000 x 576`."""
    return " x ".join(map(str, tensor.shape)) or "scalar"

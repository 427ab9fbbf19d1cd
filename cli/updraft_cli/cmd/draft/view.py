"""Draft versions on a terminal. A column that no row has a value for is left out."""

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.drafts import (
    Acceptance,
    Draft,
    DraftDetails,
    DraftList,
    History,
    HistoryEntry,
    KubernetesEvent,
    OfflineEvaluation,
    Provenance,
    Tensor,
    WaitingImport,
)

if TYPE_CHECKING:
    from updraft_cli.models.importing import Imported

_SHOWN_TENANTS = 4

_PHASE_STYLES = {
    "stable": "bold green",
    "canary": "bold yellow",
    "rejected": "red",
    "failed": "red",
    "rolled back": "red",
    "superseded": "dim",
}


def rendered_list(drafts: DraftList, now: datetime, *, is_wide: bool) -> RenderableType:
    """The versions, and below them a line for each import that is none yet."""
    imports = [_import(one, has_namespace=not drafts.namespace) for one in drafts.imports]
    versions = _versions(drafts, now, is_wide=is_wide)
    return Group(versions, "", *imports) if imports else versions


def _versions(drafts: DraftList, now: datetime, *, is_wide: bool) -> RenderableType:
    if not drafts.drafts:
        where = drafts.speculator or (f"namespace {drafts.namespace}" if drafts.namespace else "any namespace")
        return f"No drafts of {where} yet. {output.sentence(drafts.message)}".rstrip()
    columns = _columns(drafts, now, is_wide=is_wide)
    table = output.table(*columns)
    for draft in drafts.drafts:
        table.add_row(*(cell(draft) for cell in columns.values()))
    return table


def _import(one: WaitingImport, *, has_namespace: bool) -> Text:
    where = f"{one.namespace}: " if has_namespace else ""
    return Text(f"{where}{output.sentence(one.text)}", "red" if one.has_failed else "")


def rendered_details(details: DraftDetails, now: datetime, *, is_wide: bool) -> RenderableType:
    """One version; wide, with whole digests."""
    parts: list[RenderableType] = [output.facts(_facts(details, now, is_wide=is_wide))]
    parts += ["", _entries(details.speculator, details.history, is_wide=False)]
    if details.tensors:
        parts += ["", _tensors(details.tensors, is_wide=is_wide)]
    return Group(*parts)


def rendered_history(history: History, *, is_wide: bool) -> RenderableType:
    """Oldest first; wide, with the version and the phase before, and the Kubernetes Events."""
    entries = _entries(history.speculator, history.events, is_wide=is_wide)
    if not is_wide:
        return entries
    if history.events_problem:
        return Group(entries, "", Text(output.sentence(f"Events cannot be read: {history.events_problem}"), "yellow"))
    if history.kubernetes_events is None:
        return entries
    if not history.kubernetes_events:
        return Group(entries, "", "There are no Events; by default the API server keeps them for an hour.")
    return Group(entries, "", _kubernetes_events(history.kubernetes_events))


def rendered_import(imported: "Imported", *, is_wide: bool) -> RenderableType:
    draft = imported.draft
    if imported.existed:
        return (
            f"{imported.speculator} already has these weights: version {draft.version}, {draft.phase}: {draft.reason}"
        )
    text = Text(f"Imported as version {draft.version} of {imported.speculator}, ") + phase(draft.phase)
    reason = "" if draft.reason in imported.message else f": {draft.reason}"
    return text + f"{reason}. {output.sentence(imported.message)}"


def phase(name: str, *remarks: str) -> Text:
    return Text(", ".join((name, *filter(None, remarks))), _PHASE_STYLES.get(name, ""))


def length(acceptance: Acceptance | None) -> str:
    """Return the acceptance length in tokens per verify step."""
    return f"{acceptance.length:.2f}" if acceptance else "-"


def offline(evaluation: OfflineEvaluation | None) -> str:
    if evaluation is None:
        return "not evaluated"
    baseline = f"version {evaluation.baseline_version}" if evaluation.baseline_version else "no draft"
    return (
        f"{evaluation.candidate_length:.2f} tokens per step, {evaluation.baseline_length:.2f} with {baseline}"
        f" ({evaluation.requests} held-out requests, up to {evaluation.lookahead} draft tokens)"
    )


def shape(tensor: Tensor) -> str:
    """Return `32000 x 576`."""
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _columns(drafts: DraftList, now: datetime, *, is_wide: bool) -> dict[str, Callable[[Draft], str | Text]]:
    some, is_narrow = drafts.drafts, not is_wide
    shown = {
        "namespace": not drafts.namespace and any(draft.namespace for draft in some),
        "speculator": not drafts.speculator,
        "by position": is_wide and any(draft.acceptance and draft.acceptance.by_position for draft in some),
        ">loaded": any(draft.pods_loaded is not None for draft in some),
        ">parent": is_wide,
        ">samples": is_wide,
        ">step": is_wide and any(draft.step is not None for draft in some),
        ">size": is_wide and any(draft.size_bytes is not None for draft in some),
        "source": is_wide,
        "digest": is_wide,
        "object": is_wide and any(draft.object for draft in some),
        "published": is_narrow,
        "published (UTC)": is_wide,
    }
    cells: dict[str, Callable[[Draft], str | Text]] = {
        "namespace": lambda draft: draft.namespace,
        "speculator": lambda draft: draft.speculator,
        ">version": lambda draft: str(draft.version),
        "phase": _phase,
        ">accepted": lambda draft: length(draft.acceptance),
        "by position": lambda draft: output.percents(draft.acceptance.by_position if draft.acceptance else ()),
        ">loaded": lambda draft: f"{_number(draft.pods_loaded)}/{_number(draft.pods_wanted)}",
        ">parent": lambda draft: _number(draft.parent or None),
        ">samples": lambda draft: _number(draft.samples),
        ">step": lambda draft: _number(draft.step),
        ">size": lambda draft: "-" if draft.size_bytes is None else output.size(draft.size_bytes),
        "source": lambda draft: draft.source,
        "digest": lambda draft: output.short(draft.digest) or "-",
        "object": lambda draft: draft.object,
        "published": lambda draft: output.ago(draft.published, now) if draft.published else "-",
        "published (UTC)": lambda draft: output.timestamp(draft.published) if draft.published else "-",
        "reason": lambda draft: draft.reason if is_wide else output.cut(draft.reason),
    }
    return {name: cell for name, cell in cells.items() if shown.get(name, True)}


def _number(number: int | None) -> str:
    return "-" if number is None else str(number)


def _phase(draft: Draft) -> Text:
    return phase(draft.phase or "-", "pinned" if draft.pinned else "", "retained" if draft.retained else "")


def _facts(details: DraftDetails, now: datetime, *, is_wide: bool) -> Iterator[tuple[str, str | Text]]:
    draft, digest = details.draft, str if is_wide else output.short
    yield "version", f"{draft.version} of {details.speculator}"
    since = f" since {output.timestamp(draft.since)} UTC" if draft.since else ""
    retained = "; kept regardless of the retention policy" if draft.retained else ""
    yield "phase", phase(draft.phase) + f"{since}{retained}"
    yield "reason", draft.reason
    code = f", code {details.provenance.code_version}" if details.provenance and details.provenance.code_version else ""
    when = f"{output.timestamp(draft.published)} UTC ({output.ago(draft.published, now)})" if draft.published else "-"
    yield "published", f"{when}, source {draft.source}{code}"
    yield "trained", _training(draft)
    if details.provenance and details.provenance.origin:
        rate = details.provenance.learning_rate
        yield "origin", details.provenance.origin + (f", then learning at {rate:g}" if rate else "")
    if details.provenance and details.provenance.tenants:
        yield "tenants", _tenants(details.provenance, is_wide=is_wide)
    if details.provenance:
        yield "offline", offline(details.evaluation)
    yield "live", _live(draft.acceptance)
    size = f"{output.size(draft.size_bytes)}, " if draft.size_bytes is not None else ""
    yield "weights", f"{size}{digest(draft.digest)}"
    if details.provenance:
        yield "tensors", digest(details.tensors_digest)
        yield "target", digest(details.target_fingerprint)
        yield "tokenizer", digest(details.tokenizer_fingerprint) or "unknown"
        yield "vocabulary", digest(details.draft_vocabulary_fingerprint)
    if draft.pods_wanted is not None:
        yield "loaded", f"on {_number(draft.pods_loaded)} of {draft.pods_wanted} pods"


def _tenants(provenance: Provenance, *, is_wide: bool) -> str:
    """Whom it may have learned from; wide, all of them."""
    listed = provenance.tenants if is_wide else provenance.tenants[:_SHOWN_TENANTS]
    more = " and others" if provenance.has_more_tenants or len(listed) < len(provenance.tenants) else ""
    return f"{output.count(len(provenance.tenants), 'tenant')}: {', '.join(listed)}{more}"


def _training(draft: Draft) -> str:
    scratch = "from scratch" if draft.source == "trainer" else "elsewhere"
    origin = f"from version {draft.parent}" if draft.parent else scratch
    step = f", step {draft.step}" if draft.step is not None else ""
    return f"{origin}, {output.count(draft.samples, 'sample')}{step}" if draft.samples else origin


def _live(acceptance: Acceptance | None) -> str:
    if acceptance is None:
        return "not served by the pods that are connected now"
    steps = f" over {output.count(acceptance.verify_steps, 'step')}" if acceptance.verify_steps else ""
    positions = f"; accepted by position: {output.percents(acceptance.by_position)}" if acceptance.by_position else ""
    return f"{acceptance.length:.2f} tokens per step{steps}{positions}"


def _entries(speculator: str, entries: tuple[HistoryEntry, ...], *, is_wide: bool) -> RenderableType:
    if not entries:
        return f"{speculator} has no history yet."
    left_out: tuple[str, ...] = ()
    if not is_wide:  # of one version, the number says nothing; the phase before is the line before
        is_single = len({entry.version for entry in entries}) == 1
        left_out = (">version", "was") if is_single else ("was",)
    columns: dict[str, Callable[[HistoryEntry], str | Text]] = {
        "time (UTC)": lambda entry: output.timestamp(entry.time),
        ">version": lambda entry: str(entry.version or "-"),
        "was": lambda entry: Text(entry.before or "-", "dim"),
        "became": lambda entry: phase(entry.phase) if entry.phase else Text("-"),
        "by": lambda entry: entry.actor,
        "why": lambda entry: entry.reason,
    }
    shown = {name: cell for name, cell in columns.items() if name not in left_out}
    table = output.table(*shown)
    for entry in entries:
        table.add_row(*(cell(entry) for cell in shown.values()))
    return table


def _kubernetes_events(events: tuple[KubernetesEvent, ...]) -> Table:
    table = output.table("time (UTC)", "type", "event", "about", ">times", "message")
    for event in events:
        table.add_row(
            output.timestamp(event.time) if event.time else "-",
            Text(event.type, "yellow" if event.type == "Warning" else ""),
            event.reason,
            f"{event.kind}/{event.name}",
            str(event.count),
            event.message,
        )
    return table


def _tensors(tensors: tuple[Tensor, ...], *, is_wide: bool) -> Table:
    table = output.table("tensor", "type", "shape", "digest")
    for tensor in tensors:
        table.add_row(
            tensor.name, tensor.dtype, shape(tensor), tensor.digest if is_wide else output.short(tensor.digest)
        )
    return table

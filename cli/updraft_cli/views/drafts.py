"""Draft versions on a terminal."""

from rich.console import Console
from rich.text import Text

from updraft_cli import output
from updraft_cli.drafts import Acceptance, Details, Draft, Listing, OfflineEvaluation
from updraft_cli.output import Format

_PHASE_STYLES = {
    "stable": "bold green",
    "rejected": "red",
    "failed": "red",
    "rolled back": "red",
    "superseded": "dim",
}


def show_list(listing: Listing, format: Format) -> None:  # noqa: A002 - the command's own word
    """Print all versions."""
    console = output.console()
    if format == "json":
        console.out(output.dump(listing))
        return
    if not listing.drafts:
        console.print(f"No drafts of {listing.speculator} yet. {_sentence(listing.message)}")
        return
    table = output.table(">version", "phase", ">accepted", "by position", ">samples", ">size", "published", "reason")
    for draft in listing.drafts:
        table.add_row(
            str(draft.version),
            phase(draft.phase, is_pinned=draft.version == listing.pinned),
            length(draft.acceptance),
            output.percents(draft.acceptance.by_position if draft.acceptance else ()),
            str(draft.samples),
            output.size(draft.size_bytes),
            output.ago(draft.published),
            draft.reason,
        )
    console.print(table)


def show_details(details: Details, format: Format) -> None:  # noqa: A002 - the command's own word
    """Print one version."""
    console = output.console()
    if format == "json":
        console.out(output.dump(details))
        return
    facts = output.table("", "")
    facts.show_header = False
    for name, value in _facts(details):
        facts.add_row(Text(name, "dim"), value)
    console.print(facts)
    _show_history(console, details)
    _show_tensors(console, details)


def phase(name: str, *, is_pinned: bool = False) -> Text:
    """Return a phase in its colour."""
    return Text(f"{name}, pinned" if is_pinned else name, _PHASE_STYLES.get(name, ""))


def length(acceptance: Acceptance | None) -> str:
    """Return the acceptance length, tokens a verify step."""
    return f"{acceptance.length:.2f}" if acceptance else "-"


def _facts(details: Details) -> list[tuple[str, str | Text]]:
    draft = details.draft
    return [
        ("version", f"{draft.version} of {details.speculator}"),
        ("phase", phase(draft.phase)),
        ("reason", draft.reason),
        (
            "published",
            f"{draft.published:%Y-%m-%d %H:%M:%S} UTC by {details.source}, code {details.code_version}",
        ),
        ("trained", _training(draft)),
        ("offline", _offline(details.evaluation)),
        ("live", _live(draft.acceptance)),
        ("weights", f"{output.size(draft.size_bytes)}, {draft.digest}"),
        ("tensors", details.tensors_digest),
        ("target", details.target_fingerprint),
    ]


def _training(draft: Draft) -> str:
    origin = f"from version {draft.parent}" if draft.parent else "from scratch"
    return f"{origin}, {draft.samples} samples, step {draft.step}"


def _offline(evaluation: OfflineEvaluation | None) -> str:
    if evaluation is None:
        return "not evaluated"
    baseline = f"version {evaluation.baseline_version}" if evaluation.baseline_version else "no draft"
    return (
        f"{evaluation.candidate_length:.2f} tokens a step, {evaluation.baseline_length:.2f} with {baseline}"
        f" ({evaluation.requests} held-out requests, up to {evaluation.lookahead} drafts)"
    )


def _live(acceptance: Acceptance | None) -> str:
    if acceptance is None:
        return "not served yet"
    return (
        f"{acceptance.length:.2f} tokens a step over {acceptance.verify_steps} steps;"
        f" accepted by position: {output.percents(acceptance.by_position)}"
    )


def _show_history(console: Console, details: Details) -> None:
    table = output.table("time (UTC)", "became", "by", "why")
    for event in details.history:
        table.add_row(f"{event.time:%Y-%m-%d %H:%M:%S}", phase(event.phase), event.actor, event.reason)
    console.print()
    console.print(table)


def _show_tensors(console: Console, details: Details) -> None:
    table = output.table("tensor", "type", "shape", "digest")
    for tensor in details.tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(tensor.name, tensor.dtype, shape, output.short(tensor.digest))
    console.print()
    console.print(table)


def _sentence(message: str) -> str:
    return f"{message[:1].upper()}{message[1:]}." if message else ""

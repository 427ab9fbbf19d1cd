"""The status of an installation on a terminal."""

from rich.console import Console
from rich.text import Text

from updraft_cli import output
from updraft_cli.output import Format
from updraft_cli.status import Process, Serving, Speculator, Status, Training
from updraft_cli.views.drafts import length, phase

_STATE_STYLES = {"ready": "green", "starting": "yellow", "restarting": "yellow", "failed": "red"}


def show(status: Status, format: Format) -> None:  # noqa: A002 - the command's own word
    """Print it."""
    console = output.console()
    if format == "json":
        console.out(output.dump(status))
        return
    if status.processes:
        _show_processes(console, status.processes)
    if status.speculators is None:
        console.print("\n[yellow]The registry does not answer.[/]")
    for speculator in status.speculators or ():
        _show_speculator(console, speculator)
    if status.speculators == ():
        console.print("\nThe registry knows no drafts yet.")
    _show_facts(console, "inference", _serving(status.serving))
    _show_facts(console, "trainer", _training(status.training))


def _show_processes(console: Console, processes: tuple[Process, ...]) -> None:
    table = output.table("process", "state", ">pid", ">restarts", "address", "log")
    for process in processes:
        table.add_row(
            process.name,
            Text(process.state, _STATE_STYLES.get(process.state, "")),
            str(process.pid or "-"),
            str(process.restarts),
            process.address,
            process.log,
        )
    console.print(table)


def _show_speculator(console: Console, speculator: Speculator) -> None:
    serves = f"serves version {speculator.stable}" if speculator.stable else "serves without a draft"
    pinned = "" if speculator.pinned is None else f", pinned to {speculator.pinned}"
    pods = "1 pod" if speculator.pods == 1 else f"{speculator.pods} pods"
    console.print(f"\n[bold]speculator {speculator.name}[/] {serves}{pinned} on {pods}: {speculator.message}")
    if not speculator.traffic:
        return
    table = output.table(">version", "phase", ">accepted", "by position", ">verify steps", ">tokens")
    for row in speculator.traffic:
        table.add_row(
            str(row.version),
            phase(row.phase),
            length(row.acceptance),
            output.percents(row.acceptance.by_position),
            str(row.acceptance.verify_steps),
            str(row.acceptance.tokens),
        )
    console.print(table)


def _show_facts(console: Console, part: str, facts: list[str]) -> None:
    console.print(f"\n[bold]{part}[/]")
    for fact in facts:
        console.print(f"  {fact}")


def _serving(serving: Serving | None) -> list[str]:
    if serving is None:
        return ["does not answer"]
    dropped = _pairs(serving.capture_dropped)
    return [
        f"draft version {serving.draft_version}, {serving.swaps} swaps since its start",
        f"{serving.running_requests} requests running, {serving.queued_requests} waiting",
        f"{serving.output_tokens} tokens so far",
        f"tokens a verify step, mean of requests: {_lengths(serving.acceptance_length)}",
        f"{serving.captured} traces captured, {f'not kept: {dropped}' if dropped else 'none lost'}",
    ]


def _training(training: Training | None) -> list[str]:
    if training is None:
        return ["does not answer, or is not part of this stack"]
    loss = "" if training.loss is None else f", loss {training.loss:.3f}"
    return [
        f"{training.optimizer_steps} optimizer steps since its start on {training.trained_tokens} tokens{loss}",
        f"samples taken: {_pairs(training.samples) or 'none yet'}",
        f"held-out tokens a verify step: {_lengths(training.acceptance_length)}",
        f"published: {_pairs(training.published) or 'nothing yet'}",
    ]


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _lengths(lengths: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in lengths.items()) or "not measured yet"

"""The status of an installation on a terminal."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from updraft_cli import output
from updraft_cli.cmd.draft.view import length, phase
from updraft_cli.cmd.status.gather import Process, Serving, Speculator, Status, Training

_STATE_STYLES = {"ready": "green", "starting": "yellow", "restarting": "yellow", "failed": "red"}


def rendered(status: Status, *, is_wide: bool) -> RenderableType:
    """All of it, part by part; wide, with process ids and logs."""
    lines: list[RenderableType] = []
    for part in _parts(status, is_wide=is_wide):
        lines += ["", *part] if lines else part
    return Group(*lines)


def _parts(status: Status, *, is_wide: bool) -> Iterator[list[RenderableType]]:
    if status.processes:
        yield [_processes(status.processes, is_wide=is_wide)]
    if status.speculators is None:
        yield [Text("The registry does not answer.", "yellow")]
    elif not status.speculators:
        yield ["The registry knows no drafts yet."]
    for speculator in status.speculators or ():
        yield list(_speculator(speculator))
    yield list(_facts("inference", _serving(status.serving)))
    yield list(_facts("trainer", _training(status.training)))


def _processes(processes: tuple[Process, ...], *, is_wide: bool) -> Table:
    more = (">pid", "log") if is_wide else ()
    table = output.table("process", "state", ">restarts", "address", *more)
    for process in processes:
        table.add_row(
            process.name,
            Text(process.state, _STATE_STYLES.get(process.state, "")),
            str(process.restarts),
            process.address,
            *((str(process.pid or "-"), process.log) if is_wide else ()),
        )
    return table


def _speculator(speculator: Speculator) -> Iterator[RenderableType]:
    serves = f"serves version {speculator.stable}" if speculator.stable else "serves without a draft"
    candidate = f", tries version {speculator.candidate}" if speculator.candidate else ""
    pinned = "" if speculator.pinned is None else f", pinned to {speculator.pinned}"
    pods = output.count(speculator.pods, "pod")
    yield Text.assemble(
        (f"speculator {speculator.name}", "bold"), f" {serves}{candidate}{pinned} on {pods}: {speculator.message}"
    )
    if speculator.capture_problem:
        yield Text(f"nothing is captured by {speculator.capture_problem}", "yellow")
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
    yield table


def _facts(part: str, facts: list[str]) -> Iterator[RenderableType]:
    yield Text(part, "bold")
    for fact in facts:
        yield f"  {fact}"


def _serving(serving: Serving | None) -> list[str]:
    if serving is None:
        return ["does not answer"]
    dropped = _pairs(serving.capture_dropped)
    return [
        f"draft version {serving.draft_version}, {output.count(serving.swaps, 'swap')} since its start",
        f"{output.count(serving.running_requests, 'request')} running, {serving.queued_requests} waiting",
        f"{output.count(serving.output_tokens, 'token')} so far",
        f"tokens a verify step, mean of requests: {_lengths(serving.acceptance_length)}",
        *_lookahead(serving),
        f"{output.count(serving.captured, 'trace')} captured, {f'not kept: {dropped}' if dropped else 'none lost'}",
    ]


def _lookahead(serving: Serving) -> Iterator[str]:
    for drafter, by_position in serving.expected_survival.items():
        rates = ", ".join(f"{position}: {100 * rate:.0f} %" for position, rate in by_position.items())
        yield f"{drafter} drafts expected to be kept, by their number: {rates}"
    if serving.verify_ms:
        costs = ", ".join(f"{rows}: {ms:.1f} ms" for rows, ms in serving.verify_ms.items())
        yield f"a verify step, by rows: {costs}"


def _training(training: Training | None) -> list[str]:
    if training is None:
        return ["does not answer, or is not part of this stack"]
    loss = "" if training.loss is None else f", loss {training.loss:.3f}"
    steps = output.count(training.optimizer_steps, "optimizer step")
    return [
        f"{steps} since its start on {output.count(training.trained_tokens, 'token')}{loss}",
        f"samples taken: {_pairs(training.samples) or 'none yet'}",
        f"held-out tokens a verify step: {_lengths(training.acceptance_length)}",
        f"published: {_pairs(training.published) or 'nothing yet'}",
    ]


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _lengths(lengths: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in lengths.items()) or "not measured yet"

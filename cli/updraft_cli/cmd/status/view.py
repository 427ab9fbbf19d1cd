"""Everything that runs, on a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.installation import Installation, Serving, Training
from updraft_cli.backends.speculators import Condition, Pace, Resource, ServedVersion, Speculator, Speedup
from updraft_cli.cmd.draft.view import length, phase
from updraft_cli.cmd.follow import Item
from updraft_cli.cmd.rollout.view import Fact, held, message, num_pods, pods, stable
from updraft_cli.local.process import ProcessState
from updraft_cli.output import ago

_STATE_STYLES = {"ready": "green", "starting": "yellow", "restarting": "yellow", "failed": "red"}
_MAX_SHARES = 5
"""Phases of training that are shown one by one."""

CONDITION_STYLES = {"True": "green", "False": "red", "Unknown": "yellow"}


def rendered(installation: Installation, now: datetime, *, is_wide: bool) -> RenderableType:
    """Part by part; wide, with process ids and logs, and every condition."""
    lines: list[RenderableType] = []
    for part in _parts(installation, now, is_wide=is_wide):
        lines += ["", *part] if lines else part
    return Group(*lines)


def items(installation: Installation) -> Sequence[Item] | None:
    if installation.speculators is None:
        return None
    return tuple(
        Item(name=_title(speculator), key=_key(speculator), value=speculator, line=line(speculator))
        for speculator in installation.speculators
    )


def line(speculator: Speculator) -> str:
    """Return one line for a log: name, readiness, pods, versions, reason."""
    candidate = f", candidate version {speculator.candidate}" if speculator.candidate else ""
    serves = f"serves version {speculator.stable}" if speculator.stable else "serves no draft"
    count = f"{num_pods(speculator)} pods {'ready' if speculator.resource else 'connected'}"
    ready = f" {_readiness(speculator.resource)}" if speculator.resource else ""
    return f"{_title(speculator)}{ready}, {count}, {serves}{candidate}: {_why(speculator)}"


def _parts(installation: Installation, now: datetime, *, is_wide: bool) -> Iterator[list[RenderableType]]:
    is_local, speculators = installation.processes is not None, installation.speculators
    if installation.processes:
        yield [_processes(installation.processes, is_wide=is_wide)]
    if speculators is None:
        yield [Text("The registry does not answer.", "yellow")]
    elif not speculators and is_local:
        yield ["The registry has no drafts yet."]
    elif not speculators:
        where = f"namespace {installation.namespace}" if installation.namespace else "any namespace"
        yield [f"There is no AdaptiveSpeculator in {where}."]
    elif len(speculators) > 1 and not is_local and not is_wide:
        yield [_rows(installation.namespace, speculators)]
    else:
        for speculator in speculators:
            yield _block(speculator, now, is_wide=is_wide)
    if is_local:
        yield [Text("inference", "bold"), *(f"  {fact}" for fact in _serving(installation.serving))]
        yield [Text("trainer", "bold"), *(f"  {fact}" for fact in _training(installation.training))]


def _processes(processes: tuple[ProcessState, ...], *, is_wide: bool) -> Table:
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


def _rows(namespace: str, speculators: tuple[Speculator, ...]) -> Table:
    columns = ("name", "ready", "stable", "candidate", ">pods", ">accepted", "trainer", "why")
    table = output.table(*(("namespace",) if not namespace else ()), *columns)
    for speculator in speculators:
        table.add_row(
            *((speculator.namespace,) if not namespace else ()),
            speculator.name,
            _state(speculator.resource),
            str(speculator.stable or "-"),
            str(speculator.candidate or "-"),
            num_pods(speculator),
            length(speculator.acceptance),
            (speculator.resource.trainer_state.lower() if speculator.resource else "") or "-",
            output.cut(_why(speculator)),
        )
    return table


def _block(speculator: Speculator, now: datetime, *, is_wide: bool) -> list[RenderableType]:
    title = Text(f"speculator {speculator.name}", "bold")
    if speculator.resource is not None:
        title = Text(f"{speculator.name} in namespace {speculator.namespace}: ", "bold") + _state(speculator.resource)
    parts: list[RenderableType] = [title, output.facts(_facts(speculator, now, is_wide=is_wide))]
    if speculator.traffic:
        parts.append(_traffic(speculator.traffic))
    if speculator.domains:
        parts += ["", _domains(speculator)]
    if is_wide and speculator.resource is not None and speculator.resource.conditions:
        parts += ["", _conditions(speculator.resource.conditions, now)]
    return parts


def _facts(speculator: Speculator, now: datetime, *, is_wide: bool) -> Iterator[Fact]:
    resource = speculator.resource
    if resource is not None:
        yield "why", _why(speculator)
    yield "stable", stable(speculator)
    if speculator.candidate:
        yield "candidate", _candidate(speculator)
    elif speculator.message or resource is None:
        yield "rollout", message(speculator)
    yield from held(speculator)
    yield "pods", pods(speculator)
    if speculator.speedup is not None:
        yield "speed", _speed(speculator.speedup)
    yield from _learning(speculator, now)
    if resource is None:
        return
    if (failure := resource.last_failure) is not None:
        when = f" {ago(failure.time, now)}" if failure.time else ""
        yield "last failure", Text(f"version {failure.version}{when}: {failure.message or failure.reason}", "red")
    if is_wide:
        yield "target", f"{resource.target}, engine {resource.engine}"
        yield "clients", resource.url or "-"


def _learning(speculator: Speculator, now: datetime) -> Iterator[Fact]:
    if speculator.capture_problem:
        yield "capture", Text(f"capture has a problem on {speculator.capture_problem}", "yellow")
    yield from _learned(speculator)
    if speculator.pace is not None and speculator.pace.shares:  # else there was no turn of training yet
        yield from _pace(speculator.pace, now)
    resource, message = speculator.resource, speculator.trainer_message
    if resource is not None:
        published = f", published {ago(resource.last_published, now)}" if resource.last_published else ""
        yield "trainer", f"{resource.trainer_state.lower() or '-'}{published}{f': {message}' if message else ''}"
    elif message:
        yield "trainer", message


def _learned(speculator: Speculator) -> Iterator[Fact]:
    """The trainer's progress, or the reason why nothing can be learned."""
    adapting = speculator.resource.condition("Adapting") if speculator.resource is not None else None
    if speculator.too_small:
        yield "too small", Text(speculator.too_small, "yellow")
    if adapting is not None and adapting.reason != "TooSmall":
        yield "learning", Text(adapting.message, "" if adapting.status == "True" else "yellow")
    if (done := speculator.learning) is not None:
        requests = f"{done.samples:,} requests to train on and {done.held_out:,} held-out ones"
        yield "learning", f"{requests}, {done.steps:,} steps, {done.estimates:,} estimates since the trainer started"


def _pace(pace: Pace, now: datetime) -> Iterator[Fact]:
    ranks = f"{pace.ranks} ranks " if pace.ranks > 1 else ""
    where = f"{ranks}on {pace.device}, " if pace.device else ""
    peak = "" if pace.utilization is None else f", {100 * pace.utilization:.0f} % of peak"
    yield "training", f"{where}{pace.tokens_per_second:,.0f} trained tokens/s in the last minute{peak}"
    yield "time", _time_shares(pace.shares)
    saved = f"saved {ago(pace.last_save, now)}" if pace.last_save else "nothing is saved yet"
    yield "next", f"{_next_estimate(pace, now)}; {saved}"


def _time_shares(shares: dict[str, float]) -> str:
    """The largest ones, and the rest together."""
    percents = {phase.replace("_", "-"): round(100 * share) for phase, share in shares.items()}
    largest = {phase: percent for phase, percent in list(percents.items())[:_MAX_SHARES] if percent}
    if (rest := 100 - sum(largest.values())) > 0:
        largest["other"] = rest
    return ", ".join(f"{phase} {percent} %" for phase, percent in largest.items())


def _next_estimate(pace: Pace, now: datetime) -> str:
    steps = output.count(pace.steps_to_estimate, "step")
    if pace.estimate_due is None:
        return f"an estimate in {steps}"
    if not pace.steps_to_estimate:
        return "an estimate is due"
    seconds = (pace.estimate_due - now).total_seconds()
    when = f"in {output.span(seconds)}" if seconds >= 1 else "as soon as anything has changed"
    return f"an estimate in {steps} or {when}"


def _speed(speedup: Speedup) -> Text:
    text = f"{speedup.ratio:.2f} times that of decoding without drafts ({speedup.low:.2f} to {speedup.high:.2f})"
    return Text(text, "yellow" if speedup.high < 1.0 else "")


def _candidate(speculator: Speculator) -> str:
    trial = speculator.trial
    step = f", step {trial.step} of {trial.steps}" if trial and trial.step and trial.steps else ""
    change = trial.acceptance_length if trial else None
    measured = f", {change.candidate:.2f} tokens per step" if change else ""
    return f"version {speculator.candidate}{step}{measured}: {speculator.message or 'in canary'}"


def _traffic(traffic: tuple[ServedVersion, ...]) -> Table:
    table = output.table(">version", "phase", ">accepted", "by position", ">verify steps", ">tokens")
    for row in traffic:
        table.add_row(
            str(row.version),
            phase(row.phase),
            length(row.acceptance),
            output.percents(row.acceptance.by_position),
            str(row.acceptance.verify_steps),
            str(row.acceptance.tokens),
        )
    return table


def _domains(speculator: Speculator) -> Table:
    """Tokens per verify step by domain. Callers choose the names, so they are text and no markup."""
    roles = ("stable", "candidate") if speculator.candidate else ("stable",)
    table = output.table("domain", *(f">{role}" for role in roles))
    for one in speculator.domains:
        lengths = (one.stable, one.candidate)[: len(roles)]
        table.add_row(Text(one.domain), *("-" if length is None else f"{length:.2f}" for length in lengths))
    return table


def _conditions(conditions: tuple[Condition, ...], now: datetime) -> Table:
    table = output.table("condition", "status", "reason", "since", "message")
    for condition in conditions:
        table.add_row(
            condition.type,
            Text(condition.status, CONDITION_STYLES.get(condition.status, "")),
            condition.reason,
            ago(condition.since, now) if condition.since else "-",
            condition.message,
        )
    return table


def _title(speculator: Speculator) -> str:
    return f"{speculator.namespace}/{speculator.name}" if speculator.namespace else speculator.name


def _key(speculator: Speculator) -> object:
    """A registry counts traffic, and during a canary the seconds of its message, and trainers estimate often: none of this is
    worth a line."""
    if speculator.resource is not None:
        return replace(speculator, trainer_message="", pace=None, resource=_without_counts(speculator.resource))
    message = "" if speculator.candidate else speculator.message
    return speculator.stable, speculator.candidate, speculator.pinned, speculator.paused, speculator.pods, message


def _without_counts(resource: Resource) -> Resource:
    """The message of Adapting counts steps."""
    kept = (replace(one, message="") if one.type == "Adapting" else one for one in resource.conditions)
    return replace(resource, conditions=tuple(kept))


def _state(resource: Resource | None) -> Text:
    ready = resource.condition("Ready") if resource else None
    return Text(_readiness(resource), CONDITION_STYLES.get(ready.status if ready else "Unknown", ""))


def _readiness(resource: Resource | None) -> str:
    ready = resource.condition("Ready") if resource else None
    if ready is None:
        return "not reconciled yet"
    return "ready" if ready.status == "True" else f"not ready ({ready.reason})"


def _why(speculator: Speculator) -> str:
    resource = speculator.resource
    if resource is None:
        return message(speculator)
    if (ready := resource.condition("Ready")) is None:
        return "no operator has reconciled it yet"
    before = "" if resource.is_current else "before the last change of the spec: "
    return f"{before}{ready.message or ready.reason}"


def _serving(serving: Serving | None) -> list[str]:
    if serving is None:
        return ["does not answer"]
    dropped = _pairs(serving.capture_dropped)
    return [
        f"draft version {serving.draft_version}, {output.count(serving.swaps, 'swap')} since its start",
        f"{output.count(serving.running_requests, 'request')} running, {serving.queued_requests} waiting",
        f"{output.count(serving.output_tokens, 'token')} so far",
        f"tokens per verify step, mean over requests: {_lengths(serving.acceptance_length)}",
        *_lookahead(serving),
        *_kernels(serving.kernels),
        f"{output.count(serving.captured, 'trace')} captured, {f'dropped: {dropped}' if dropped else 'none lost'}",
    ]


def _kernels(variant: str) -> Iterator[str]:
    if variant == "torch":
        yield (
            "no C++ kernels: the engine uses torch's operations, which are slower on a CPU."
            " Expected on a GPU and with UPDRAFT_INFERENCE_KERNELS=off; otherwise, the inference log has the reason"
        )
    elif variant:
        yield f"C++ kernels: {variant}"


def _lookahead(serving: Serving) -> Iterator[str]:
    for drafter, by_position in serving.expected_survival.items():
        rates = ", ".join(f"{position}: {100 * rate:.0f} %" for position, rate in by_position.items())
        yield f"expected acceptance of {drafter} drafts, by position: {rates}"
    if serving.verify_ms:
        costs = ", ".join(f"{rows}: {ms:.1f} ms" for rows, ms in serving.verify_ms.items())
        yield f"time per verify step, by number of rows: {costs}"


def _training(training: Training | None) -> list[str]:
    if training is None:
        return ["does not answer, or is not part of this stack"]
    loss = "" if training.loss is None else f", loss {training.loss:.3f}"
    steps = output.count(training.optimizer_steps, "optimizer step")
    return [
        f"{steps} since its start on {output.count(training.trained_tokens, 'token')}{loss}",
        f"samples admitted: {_pairs(training.samples) or 'none yet'}",
        f"tokens per verify step on held-out requests: {_lengths(training.acceptance_length)}",
        f"published: {_pairs(training.published) or 'nothing yet'}",
    ]


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _lengths(lengths: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in lengths.items()) or "not measured yet"

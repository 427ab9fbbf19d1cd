"""The plugin's answers on a terminal: speculators, versions, what happened, explanations."""

from collections.abc import Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.drafts import History
from updraft_cli.backends.objects import Condition, Event, Speculator, Version
from updraft_cli.cmd.draft.view import phase, rendered_history
from updraft_cli.cmd.explain.explanation import Explanation, Problem
from updraft_cli.kubectl.listings import Past, Speculators, Versions
from updraft_cli.output import ago, sentence

_STYLES = {"True": "green", "False": "red", "Unknown": "yellow"}


def rendered_speculators(listing: Speculators, now: datetime, *, is_wide: bool) -> RenderableType:
    """One as facts, several as rows; wide, each as facts with its conditions."""
    found = listing.speculators
    if not found:
        where = f"namespace {listing.namespace}" if listing.namespace else "any namespace"
        return f"There is no AdaptiveSpeculator in {where}."
    if not is_wide and len(found) > 1:
        return _rows(listing)
    parts: list[RenderableType] = []
    for speculator in found:
        parts += ["", *_block(speculator, now, is_wide=is_wide)] if parts else _block(speculator, now, is_wide=is_wide)
    return Group(*parts)


def rendered_versions(listing: Versions, now: datetime, *, is_wide: bool) -> RenderableType:
    """All versions, newest first; wide, with origin and digest."""
    if not listing.versions:
        return f"There is no version in {listing.place} yet."
    namespace = ("namespace",) if not listing.namespace else ()
    owner = ("speculator",) if not listing.speculator else ()
    origin = (">parent", ">samples", "digest", "object") if is_wide else ()
    columns = (">version", "phase", ">accepted", ">loaded", "age", "source", *origin, "reason")
    table = output.table(*namespace, *owner, *columns)
    for version in listing.versions:
        table.add_row(
            *((version.namespace,) if namespace else ()),
            *((version.speculator,) if owner else ()),
            *_cells(version, listing, now),
            *(_origin(version) if is_wide else ()),
            version.reason if is_wide else output.cut(version.reason),
        )
    return table


def rendered_past(past: Past, *, is_wide: bool) -> RenderableType:
    """Changes of phase, oldest first; wide, with the Events that are still there."""
    changes = rendered_history(History(speculator=past.speculator, events=past.changes), is_wide=is_wide)
    if not is_wide:
        return changes
    if past.complaint:
        return Group(changes, "", Text(sentence(f"Events could not be read: {past.complaint}"), "yellow"))
    if not past.events:
        return Group(changes, "", "There are no Events; the API server keeps them for an hour unless told otherwise.")
    return Group(changes, "", _events(past.events))


def rendered_explanation(explanation: Explanation, now: datetime, *, is_wide: bool) -> RenderableType:
    """Sentences under headings; wide, with the fields that restart trainer and registry too."""
    parts: list[RenderableType] = [Text(f"{explanation.name} in namespace {explanation.namespace}", "bold")]
    parts += map(Text, explanation.does)
    for problem in explanation.problems:
        parts += ["", *_problem(problem, now)]
    if not explanation.problems and len(explanation.does) > 1:
        parts += ["", Text("Every condition is True.", "green")]
    if explanation.rollout:
        parts += ["", Text("Rollout", "bold"), *map(Text, explanation.rollout)]
    parts += ["", Text("What restarts pods", "bold"), Text("A new draft, a pin, a pause or a policy restarts nothing.")]
    for part, fields in explanation.restarts.items():
        if is_wide or part == "serving":
            parts.append(Text(f"A change of these fields replaces the {part} pods: {', '.join(fields)}."))
    return Group(*parts)


def line(speculator: Speculator) -> str:
    """One line for a log: who, how it is, what it serves, why."""
    stable, candidate = speculator.versions.stable, speculator.versions.candidate
    tries = f", tries version {candidate}" if candidate else ""
    serves = f"serves version {stable}" if stable else "serves no draft"
    pods = f"{_pods(speculator)} pods ready"
    return f"{speculator.namespace}/{speculator.name} {_readiness(speculator)}, {pods}, {serves}{tries}: {_why(speculator)}"


def _rows(listing: Speculators) -> Table:
    namespace = ("namespace",) if not listing.namespace else ()
    table = output.table(*namespace, "name", "ready", "serves", "tries", ">pods", ">accepted", "trainer", "why")
    for speculator in listing.speculators:
        table.add_row(
            *((speculator.namespace,) if namespace else ()),
            speculator.name,
            _state(speculator),
            _number(speculator.versions.stable),
            _number(speculator.versions.candidate),
            _pods(speculator),
            speculator.acceptance.stable or "-",
            speculator.trainer.state.lower() or "-",
            output.cut(_why(speculator)),
        )
    return table


def _block(speculator: Speculator, now: datetime, *, is_wide: bool) -> list[RenderableType]:
    title = Text(f"{speculator.name} in namespace {speculator.namespace}: ", "bold") + _state(speculator)
    parts: list[RenderableType] = [title, output.facts(_facts(speculator, now, is_wide=is_wide))]
    if is_wide and speculator.conditions:
        parts += ["", _conditions(speculator.conditions, now)]
    return parts


def _facts(speculator: Speculator, now: datetime, *, is_wide: bool) -> Iterator[tuple[str, str | Text]]:
    yield "why", _why(speculator)
    yield "serves", _serves(speculator)
    if speculator.versions.candidate is not None:
        yield "tries", _tries(speculator)
    elif speculator.rollout.message:
        yield "rollout", speculator.rollout.message
    yield from _held(speculator)
    yield "pods", _whole_pods(speculator)
    yield "trainer", _trainer(speculator, now)
    if (failure := speculator.last_failure) is not None:
        when = f" {ago(failure.time, now)}" if failure.time else ""
        yield "last failure", Text(f"version {failure.version}{when}: {failure.message or failure.reason}", "red")
    if is_wide:
        yield "target", f"{speculator.target}, engine {speculator.engine}"
        yield "clients", speculator.url or "-"


def _serves(speculator: Speculator) -> str:
    stable, acceptance = speculator.versions.stable, speculator.acceptance.stable
    if stable is None:
        return "no draft"
    return f"version {stable}" + (f", {acceptance} tokens a step" if acceptance else "")


def _tries(speculator: Speculator) -> str:
    candidate, rollout, acceptance = speculator.versions.candidate, speculator.rollout, speculator.acceptance.candidate
    step = f", step {rollout.step} of {rollout.steps}" if rollout.step and rollout.steps else ""
    measured = f", {acceptance} tokens a step" if acceptance else ""
    return f"version {candidate}{step}{measured}: {rollout.message or rollout.phase}"


def _held(speculator: Speculator) -> Iterator[tuple[str, str | Text]]:
    if (pinned := speculator.wishes.pinned) is not None:
        yield "pinned", Text(f"version {pinned}" if pinned else "no draft", "yellow")
    if speculator.wishes.paused:
        yield "paused", Text("yes", "yellow")


def _whole_pods(speculator: Speculator) -> str:
    pods, stable = speculator.pods, speculator.versions.stable
    loaded = f", {pods.serving_stable} with version {stable}" if stable and pods.serving_stable is not None else ""
    failed = f", {pods.failed} in trouble" if pods.failed else ""
    return f"{_pods(speculator)} ready{loaded}{failed}"


def _trainer(speculator: Speculator, now: datetime) -> str:
    trainer = speculator.trainer
    published = f", published {ago(trainer.last_published, now)}" if trainer.last_published else ""
    return f"{trainer.state.lower() or '-'}{published}"


def _pods(speculator: Speculator) -> str:
    wanted = speculator.pods.wanted
    return str(speculator.pods.ready) if wanted is None else f"{speculator.pods.ready}/{wanted}"


def _state(speculator: Speculator) -> Text:
    ready = speculator.condition("Ready")
    return Text(_readiness(speculator), _STYLES.get(ready.status if ready else "Unknown", ""))


def _readiness(speculator: Speculator) -> str:
    ready = speculator.condition("Ready")
    if ready is None:
        return "not looked at yet"
    return "ready" if ready.status == "True" else f"not ready ({ready.reason})"


def _why(speculator: Speculator) -> str:
    ready = speculator.condition("Ready")
    if ready is None:
        return "no operator has said anything of it yet"
    before = "" if speculator.is_current else "before the last change of the spec: "
    return f"{before}{ready.message or ready.reason}"


def _conditions(conditions: tuple[Condition, ...], now: datetime) -> Table:
    table = output.table("condition", "status", "reason", "since", "message")
    for condition in conditions:
        table.add_row(
            condition.type,
            Text(condition.status, _STYLES.get(condition.status, "")),
            condition.reason,
            ago(condition.since, now) if condition.since else "-",
            condition.message,
        )
    return table


def _cells(version: Version, listing: Versions, now: datetime) -> tuple[str | Text, ...]:
    is_pinned = (
        version.number is not None and listing.pins.get(f"{version.namespace}/{version.speculator}") == version.number
    )
    remarks = ("pinned" if is_pinned else "", "retained" if version.retained else "")
    return (
        _number(version.number),
        phase(version.phase or "-", *remarks),
        version.acceptance or "-",
        f"{_number(version.pods_loaded)}/{_number(version.pods_wanted)}",
        ago(version.created, now) if version.created else "-",
        version.source,
    )


def _origin(version: Version) -> tuple[str, ...]:
    digest = output.short(version.digest) or "-"
    return _number(version.parent), _number(version.samples), digest, version.name


def _number(number: int | None) -> str:
    return "-" if number is None else str(number)


def _events(events: tuple[Event, ...]) -> Table:
    table = output.table("time (UTC)", "type", "event", "about", ">times", "message")
    for event in events:
        table.add_row(
            output.moment(event.time) if event.time else "-",
            Text(event.type, "yellow" if event.type == "Warning" else ""),
            event.reason,
            f"{event.kind}/{event.name}",
            str(event.count),
            event.message,
        )
    return table


def _problem(problem: Problem, now: datetime) -> Iterator[RenderableType]:
    since = f" since {ago(problem.since, now).removesuffix(' ago')}" if problem.since else ""
    yield Text(f"{problem.condition} is {problem.status}{since}: {problem.reason}", _STYLES.get(problem.status, ""))
    said = (sentence(problem.message), problem.meaning)
    yield Text(" ".join(filter(None, said)) or "No more is said of it.")
    if problem.action:
        yield Text("What to do: ", "bold") + Text(problem.action)

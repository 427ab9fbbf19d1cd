"""The overview: for every speculator, what serves, what that is worth now, and what blocks learning."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from updraft_cli import output
from updraft_cli.backends.installation import Installation
from updraft_cli.backends.snapshot import Snapshot, SpeculatorSnapshot
from updraft_cli.backends.speculators import Resource, Speculator
from updraft_cli.ui.views import parts
from updraft_cli.ui.views.parts import Cell, Fact, Figure, Notice, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    name: str
    title: str
    state: Cell
    message: str
    figures: tuple[Figure, ...]
    facts: tuple[Fact, ...]
    notices: tuple[Notice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    cards: tuple[Card, ...]
    processes: Table | None
    """Those of this machine; None in a cluster."""
    empty: str


def overview(snapshot: Snapshot) -> Overview:
    installation = snapshot.installation
    where = f"namespace {installation.namespace}" if installation.namespace else "the registry"
    return Overview(
        cards=tuple(card(one, snapshot.time) for one in snapshot.speculators),
        processes=_processes(installation),
        empty="" if snapshot.speculators else f"There is no speculator in {where} yet.",
    )


def card(one: SpeculatorSnapshot, now: datetime) -> Card:
    speculator = one.speculator
    return Card(
        name=one.name,
        title=f"{speculator.namespace}/{one.name}" if speculator.namespace else one.name,
        state=state(speculator),
        message=output.sentence(speculator.message),
        figures=tuple(figures(speculator)),
        facts=tuple(_facts(one, now)),
        notices=tuple(notices(one)),
    )


def state(speculator: Speculator) -> Cell:
    """Return whether it is ready, in a cluster; else what is tried."""
    ready = speculator.resource.condition("Ready") if speculator.resource else None
    if ready is not None:
        text = "ready" if ready.status == "True" else f"not ready: {ready.reason}"
        return Cell(text=text, tag="good" if ready.status == "True" else "bad", title=ready.message)
    if speculator.candidate:
        return Cell(text="in canary", tag="canary")
    return Cell(text="serving a draft", tag="stable") if speculator.stable else Cell(text="no draft yet", tag="none")


def figures(speculator: Speculator) -> Iterator[Figure]:
    yield Figure(title="serves", value=parts.version_name(speculator.stable))
    if (speedup := speculator.speedup) is not None:
        kind = "good" if speedup.low > 1 else "bad" if speedup.high < 1 else ""
        bounds = f"{speedup.low:.2f} to {speedup.high:.2f}"
        yield Figure(title="speed over no drafts", value=f"{speedup.ratio:.2f}", unit="times", bounds=bounds, kind=kind)
    if (acceptance := parts.known(speculator.acceptance)) is not None:
        length = f"{acceptance.length:.2f}"
        since = "since the start of the pods"
        yield Figure(title="acceptance length", value=length, unit="tokens per step", bounds=since)
    if speculator.learning is not None:
        yield Figure(title="requests learned from", value=f"{speculator.learning.samples:,}")


def notices(one: SpeculatorSnapshot) -> Iterator[Notice]:
    """Yield what a person has set, what blocks learning or serving, and what cannot be read."""
    speculator = one.speculator
    if speculator.pinned is not None:
        pinned = f"pinned to {parts.version_name(speculator.pinned)}{_because(speculator.pin_reason)}"
        yield Notice(text=f"{output.sentence(pinned)} Newer versions are held.")
    if speculator.paused:
        yield Notice(text=output.sentence(f"the rollout is paused{_because(speculator.pause_reason)}"))
    if speculator.too_small:
        yield Notice(text=output.sentence(speculator.too_small))
    if speculator.capture_problem:
        yield Notice(text=output.sentence(f"capture has a problem on {speculator.capture_problem}"))
    if speculator.pods.failed:
        failed = output.count(speculator.pods.failed, "pod")
        they, are = ("it", "is") if speculator.pods.failed == 1 else ("they", "are")
        yield Notice(text=f"{failed} cannot load the version that {they} should serve, or {are} not ready.", kind="bad")
    if speculator.resource is not None:
        yield from _conditions(speculator.resource)
    yield from _registry(one)


def _registry(one: SpeculatorSnapshot) -> Iterator[Notice]:
    if one.registry_problem:
        missing = (
            "The registry cannot be read, so versions of pods, bounds of the evidence and live figures are missing"
        )
        yield Notice(text=output.sentence(f"{missing}: {one.registry_problem}"))
    if one.reported is not None:
        old = "versions of pods, bounds of the evidence, live figures and the history's newest changes"
        yield Notice(text=f"The registry is slow: {old} are as of {one.reported:%H:%M:%S}.")


def _conditions(resource: Resource) -> Iterator[Notice]:
    for condition in resource.conditions:
        if condition.status == "False" and condition.type != "Ready":
            why = output.sentence(condition.message or condition.reason)
            yield Notice(text=f"{condition.type} is false: {why}")
    if (failure := resource.last_failure) is not None:
        yield Notice(text=f"Version {failure.version} failed: {output.sentence(failure.message or failure.reason)}")


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def pods(speculator: Speculator) -> str:
    counted = speculator.pods
    wanted = "" if counted.wanted is None else f" of {counted.wanted}"
    texts = [f"{counted.num}{wanted} {'ready' if counted.connected is None else 'connected'}"]
    if speculator.stable and counted.serving_stable is not None:
        texts.append(f"{counted.serving_stable} with version {speculator.stable}")
    if speculator.candidate and counted.serving_candidate is not None:
        texts.append(f"{counted.serving_candidate} with the candidate")
    return ", ".join(texts)


def _facts(one: SpeculatorSnapshot, now: datetime) -> Iterator[Fact]:
    speculator, link = one.speculator, f"/s/{one.name}"
    if speculator.candidate:
        yield parts.fact("candidate", parts.version_name(speculator.candidate), tag="canary", href=f"{link}/rollout")
    yield parts.fact("pods", pods(speculator), href=f"{link}/fleet")
    if speculator.trainer_message:
        yield parts.fact("trainer", output.sentence(speculator.trainer_message), href=f"{link}/learning")
    if one.drafts:
        newest = one.drafts[0]
        number = parts.version_name(newest.version) if newest.version else newest.object
        yield parts.fact("newest", f"{number}, {newest.phase}: {newest.reason}", href=f"{link}/versions")
    if one.history:
        last = one.history[-1]
        what = f"version {last.version} became {last.phase}" if last.phase else last.reason
        yield parts.fact("last change", f"{what}, {parts.ago(last.time, now)}", href=f"{link}/history")


def _processes(installation: Installation) -> Table | None:
    if not installation.processes:
        return None
    kinds = {"ready": "good", "starting": "warn", "restarting": "warn", "failed": "bad"}
    rows = [
        (
            Cell(text=process.name),
            Cell(text=process.state, tag=kinds.get(process.state, "quiet")),
            parts.count(process.restarts),
            Cell(text=process.address, css="mono"),
        )
        for process in installation.processes
    ]
    return parts.table(("process", "state", ">restarts", "address"), rows, caption="Processes on this machine")

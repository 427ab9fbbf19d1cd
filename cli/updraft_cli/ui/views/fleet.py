"""The fleet: every pod as a square, in groups, and one pod with all that is known about it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from updraft_cli import output
from updraft_cli.backends.installation import Serving
from updraft_cli.backends.snapshot import PodDetails, PodState, SpeculatorSnapshot
from updraft_cli.backends.speculators import Speculator
from updraft_cli.ui.views import parts
from updraft_cli.ui.views.parts import Cell, Fact, Figure, Table
from updraft_cli.ui.views.traffic import serving_facts

STALE_S = 20.0
"""A pod reports every ten seconds."""

_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    name: str
    short: str
    """The part of the name in which it differs from the others."""
    state: str
    """stable, candidate, other, none, failed, draining, waiting, disconnected, not-ready."""
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    title: str
    squares: tuple[Square, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    figures: tuple[Figure, ...]
    groups: tuple[Group, ...]
    by: str
    ways: tuple[str, ...]
    problem: str
    empty: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPage:
    name: str
    state: Cell
    problem: str
    facts: tuple[Fact, ...]
    traffic: Table | None
    serving: tuple[Fact, ...]
    serving_problem: str
    conditions: Table | None


def _age_of(pod: PodState, now: datetime) -> str:
    if pod.last_report is None:
        return _UNKNOWN
    age_s = (now - pod.last_report).total_seconds()
    return f"reported within {STALE_S:g} s" if age_s <= STALE_S else f"silent for more than {STALE_S:g} s"


def _device(pod: PodState) -> str:
    requested = f"requests {pod.requested_device}" if pod.requested_device else _UNKNOWN
    return pod.device or requested


_BY: dict[str, Callable[[PodState, datetime], str]] = {
    "version": lambda pod, _: _UNKNOWN if pod.version is None else parts.version_name(pod.version),
    "state": lambda pod, _: pod.state,
    "engine": lambda pod, _: pod.engine or _UNKNOWN,
    "device": lambda pod, _: _device(pod),
    "digest": lambda pod, _: output.short(pod.digest) or _UNKNOWN,
    "node": lambda pod, _: pod.node or _UNKNOWN,
    "report": _age_of,
}


def fleet(one: SpeculatorSnapshot, by: str, now: datetime) -> Fleet:
    """`by` is one of the ways to group them; an unknown one is the first."""
    ways = tuple(_ways(one.pods, now))
    chosen = by if by in ways else ways[0] if ways else "state"
    return Fleet(
        figures=tuple(_figures(one)),
        groups=tuple(_groups(one, chosen, now)),
        by=chosen,
        ways=ways,
        problem=output.sentence(one.pods_problem or one.registry_problem),
        empty="" if one.pods or one.pods_problem else "No pod is known.",
    )


def pod_page(details: PodDetails, speculator: Speculator, now: datetime) -> PodPage:
    pod = details.pod
    return PodPage(
        name=pod.name,
        state=Cell(text=pod.state, tag=_TAGS.get(pod.state, "good")),
        problem=output.sentence(pod.problem or details.capture_problem),
        facts=tuple(_facts(details, now)),
        traffic=_traffic(details, speculator) if details.traffic else None,
        serving=tuple(_metrics(details.serving)) if details.serving else (),
        serving_problem=output.sentence(details.serving_problem),
        conditions=_conditions(details, now) if details.conditions else None,
    )


_TAGS = {"failed": "bad", "not ready": "bad", "disconnected": "bad", "waiting": "warn", "draining": "quiet"}


def _ways(pods: Iterable[PodState], now: datetime) -> Iterator[str]:
    """Yield the ways to group pods that tell any of them apart from unknown."""
    for name, of in _BY.items():
        if any(of(pod, now) != _UNKNOWN for pod in pods):
            yield name


def _figures(one: SpeculatorSnapshot) -> Iterator[Figure]:
    if one.pods_problem:
        return
    counts: dict[str, int] = {}
    for pod in one.pods:
        counts[pod.state] = counts.get(pod.state, 0) + 1
    yield Figure(title="pods", value=f"{len(one.pods):,}")
    for state, count in counts.items():
        kind = {"bad": "bad", "warn": "warn"}.get(_TAGS.get(state, ""), "")
        yield Figure(title=state, value=f"{count:,}", kind=kind)


def _groups(one: SpeculatorSnapshot, by: str, now: datetime) -> Iterator[Group]:
    of, prefix = _BY[by], _common([pod.name for pod in one.pods])
    groups: dict[str, list[PodState]] = {}
    for pod in one.pods:
        groups.setdefault(of(pod, now), []).append(pod)
    for title, pods in sorted(groups.items(), key=lambda group: -len(group[1])):
        squares = tuple(_square(pod, prefix, one.speculator) for pod in pods)
        yield Group(title=f"{title}: {output.count(len(pods), 'pod')}", squares=squares)


def _square(pod: PodState, prefix: str, speculator: Speculator) -> Square:
    version = "" if pod.version is None else f", {parts.version_name(pod.version)}"
    problem = f": {pod.problem}" if pod.problem else ""
    return Square(
        name=pod.name,
        short=pod.name[len(prefix) :] or pod.name,
        state=_square_state(pod, speculator),
        title=f"{pod.name}, {pod.state}{version}{problem}",
    )


def _square_state(pod: PodState, speculator: Speculator) -> str:
    if pod.state in _TAGS:
        return pod.state.replace(" ", "-")
    if pod.version is None:
        return "ready"
    if not pod.version:
        return "none"
    if pod.version == speculator.stable:
        return "stable"
    return "candidate" if pod.version == speculator.candidate else "other"


def _common(names: list[str]) -> str:
    """Return the beginning that all names share, up to a dash."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    length = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)
    return first[: first.rfind("-", 0, length) + 1]


def _facts(details: PodDetails, now: datetime) -> Iterator[Fact]:
    """Yield what is known; a registry knows the draft, and Kubernetes the machine."""
    pod, speedup = details.pod, details.speedup
    texts = {
        "holds": "" if pod.version is None else parts.version_name(pod.version),
        "keeps ready": ", ".join(map(str, pod.prefetched)),
        "engine": pod.engine,
        "device": pod.device,
        "requested device": pod.requested_device,
        "node": pod.node,
        "restarts": "" if pod.restarts is None else f"{pod.restarts:,}",
        "running requests": "" if pod.running_requests is None else f"{pod.running_requests:,}",
        "swaps": _swaps(pod),
        "speed": ""
        if speedup is None
        else f"{speedup.ratio:.2f} times that without drafts ({speedup.low:.2f} to {speedup.high:.2f})",
    }
    yield from (parts.fact(name, text) for name, text in texts.items() if text)
    if pod.digest:
        yield Fact(name="tensors", value=parts.digest(pod.digest))
    for name, time in (("started", pod.started), ("last report", pod.last_report)):
        if time is not None:
            yield Fact(name=name, value=parts.when(time, now))


def _metrics(serving: Serving) -> Iterator[Fact]:
    yield from serving_facts(serving)
    yield from (
        parts.fact(f"dropped traces, {name}", f"{number:,}") for name, number in serving.capture_dropped.items()
    )


def _swaps(pod: PodState) -> str:
    if pod.swaps is None:
        return ""
    mean = f", {1000 * (pod.swap_pause_s or 0) / pod.swaps:.1f} ms of pause each" if pod.swaps else ""
    return f"{pod.swaps:,}{mean}; {pod.refused_swaps or 0:,} refused"


def _traffic(details: PodDetails, speculator: Speculator) -> Table:
    rows = [
        (
            Cell(
                text=parts.served_name(served),
                href=f"/s/{speculator.name}/versions/{served.version}" if served.version else "",
            ),
            Cell(text=parts.length(served.acceptance), css="num"),
            Cell(text=output.percents(served.acceptance.by_position)),
            parts.count(served.acceptance.verify_steps),
            parts.count(served.acceptance.tokens),
        )
        for served in details.traffic
    ]
    columns = ("version", ">tokens per step", "accepted by position", ">verify steps", ">tokens")
    return parts.table(columns, rows, caption="Served since its process started")


def _conditions(details: PodDetails, now: datetime) -> Table:
    rows = [
        (
            Cell(text=one.type),
            Cell(text=one.status, tag={"True": "good", "False": "bad"}.get(one.status, "warn")),
            Cell(text=one.reason),
            parts.when(one.since, now),
            Cell(text=one.message),
        )
        for one in details.conditions
    ]
    return parts.table(("condition", "status", "reason", "since", "message"), rows, caption="Conditions")

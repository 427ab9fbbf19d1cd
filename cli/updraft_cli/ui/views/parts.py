"""The pieces that every page is made of; all texts are plain, and the templates escape them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from updraft_cli import output
from updraft_cli.backends.drafts import Acceptance, Draft
from updraft_cli.backends.speculators import MetricChange, ServedVersion
from updraft_cli.ui.samples import MIN_STEPS

NONE = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A text, perhaps as a tag or a link."""

    text: str
    tag: str = ""
    """Kind of tag: a phase, or good, bad, warn, quiet; empty: plain text."""
    href: str = ""
    css: str = ""
    """Classes: num, mono, quiet."""
    title: str = ""
    """Shown on hover: the whole of a shortened text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    name: str
    value: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A large number."""

    title: str
    value: str
    unit: str = ""
    bounds: str = ""
    kind: str = ""
    """good, bad, warn; empty: neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns whose names begin with > are numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    empty: str = ""
    """Sentence instead of a table without rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    text: str
    kind: str = "warn"
    """good, bad, warn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A change with its bounds on a scale from 0 to 100."""

    title: str
    text: str
    low: float
    point: float
    high: float
    zero: float
    limit: float | None
    """Where it is rolled back."""
    limit_text: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A part of a bar; position and width in percent."""

    label: str
    percent: float
    start: float
    number: int
    """From 0, for its colour."""


def fact(name: str, text: str, tag: str = "", href: str = "", css: str = "") -> Fact:
    return Fact(name=name, value=Cell(text=text, tag=tag, href=href, css=css))


def number(value: float | None, digits: int = 2) -> Cell:
    return Cell(text=NONE if value is None else f"{value:,.{digits}f}", css="num")


def count(value: int | None) -> Cell:
    return Cell(text=NONE if value is None else f"{value:,}", css="num")


def digest(value: str) -> Cell:
    return Cell(text=output.short(value) or NONE, css="mono", title=value)


def ago(time: datetime | None, now: datetime) -> str:
    return NONE if time is None else output.ago(time, now)


def when(time: datetime | None, now: datetime) -> Cell:
    return Cell(text=ago(time, now), title="" if time is None else f"{output.timestamp(time)} UTC")


def phase(name: str) -> Cell:
    return Cell(text=name or NONE, tag=name.replace(" ", "-") if name else "none")


def version_name(version: int | None) -> str:
    """Return `version 3`, or `no draft` for 0."""
    return f"version {version}" if version else "no draft"


def served_name(served: ServedVersion) -> str:
    """Return the version of some traffic. A step that also has drafts of n-gram lookup counts for none."""
    return version_name(served.version) if served.version else "mixed or no draft"


def words(name: str) -> str:
    """Return a label of a metric as words."""
    return name.replace("_", " ")


def length(acceptance: Acceptance | None) -> str:
    return f"{acceptance.length:.2f}" if acceptance else NONE


def known(acceptance: Acceptance | None) -> Acceptance | None:
    """Return an acceptance length, unless it is that of a few steps, which is noise; for places that do not show how many."""
    steps = None if acceptance is None else acceptance.verify_steps
    return None if steps is not None and steps < MIN_STEPS else acceptance


def training(draft: Draft) -> str:
    """Return what a version was trained from and on."""
    origin = (
        f"from version {draft.parent}" if draft.parent else "from scratch" if draft.source == "trainer" else "elsewhere"
    )
    samples = f", {output.count(draft.samples, 'sample')}" if draft.samples else ""
    step = f", step {draft.step:,}" if draft.step is not None else ""
    return f"{origin}{samples}{step}" if draft.samples else origin


def change(value: MetricChange | None) -> str:
    """Return `+4.2 % (+1.0 to +7.5 %)`."""
    if value is None:
        return "not enough data yet"
    if value.low_percent is None or value.high_percent is None:
        return f"{value.change_percent:+.1f} % (no bounds yet)"
    return f"{value.change_percent:+.1f} % ({value.low_percent:+.1f} to {value.high_percent:+.1f} %)"


def change_kind(value: MetricChange | None, *, is_up_good: bool) -> str:
    """Return good or bad only where the bounds leave no doubt about the direction."""
    if value is None or value.low_percent is None or value.high_percent is None:
        return ""
    is_up, is_down = value.low_percent > 0, value.high_percent < 0
    return ("good" if is_up == is_up_good else "bad") if is_up or is_down else ""


def interval(title: str, value: MetricChange, limit: float | None, *, is_up_good: bool) -> Interval | None:
    """Place a change on a scale around 0; None without bounds. `limit` is where it counts as worse, in percent."""
    if value.low_percent is None or value.high_percent is None:
        return None
    named: list[float] = [value.low_percent, value.high_percent, 0.0, *(() if limit is None else (limit,))]
    least, most = min(named), max(named)
    margin = 0.05 * (most - least) or 1.0
    width = most - least + 2 * margin

    def at(percent: float) -> float:
        return round(100 * (percent - least + margin) / width, 2)

    return Interval(
        title=title,
        text=change(value),
        low=at(value.low_percent),
        point=at(value.change_percent),
        high=at(value.high_percent),
        zero=at(0.0),
        limit=None if limit is None else at(limit),
        limit_text="" if limit is None else f"{limit:+g} %",
        kind=change_kind(value, is_up_good=is_up_good),
    )


def shares(values: Iterable[tuple[str, float]]) -> tuple[Share, ...]:
    """Return the parts of a bar, side by side; `values` are ratios of the whole."""
    parts, start = [], 0.0
    for index, (name, value) in enumerate(values):
        if round(100 * value) < 1:
            continue
        label = words(name)
        percent = round(100 * value, 2)
        parts.append(Share(label=label, percent=percent, start=round(start, 2), number=index % 10))
        start += percent
    return tuple(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, caption: str = "", empty: str = "") -> Table:
    return Table(columns=tuple(columns), rows=tuple(map(tuple, rows)), caption=caption, empty=empty)

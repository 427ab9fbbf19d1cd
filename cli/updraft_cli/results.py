"""The common parts of benchmark results and of the demo's report: machine, commit, and bars.

A bar that could not be measured is not met. Benchmarks write a `Result` as JSON and print its bars as a table.
"""

import operator
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.text import Text

from updraft_cli import output

MARKS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}"}

Relation = Literal["at least", "at most", "above"]
_MEETS: dict[Relation, Callable[[float, float], bool]] = {
    "at least": operator.ge,
    "at most": operator.le,
    "above": operator.gt,
}

_GIT_TIMEOUT_S = 5.0


class Row(BaseModel):
    """A part of a result file: immutable; the docstrings are its reference."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Machine(Row):
    """The machine of the measurement."""

    processor: str
    """Name of the processor, from Linux."""
    cores: int
    """Logical cores that this process may use."""
    memory_gb: float
    """Memory in 10^9 bytes."""
    system: str
    """Operating system and kernel."""
    python: str
    """Version of Python."""
    torch: str
    """Version of torch; empty if not installed."""


class Bar(Row):
    """A requirement, and whether it is met."""

    name: str
    """Name of the measurement."""
    measured: float | None
    """Measured number; null if the run ended before."""
    target: float
    """Number to compare with."""
    relation: Relation
    """Required relation of `measured` to `target`."""
    unit: str
    """Unit of both numbers; may be empty."""
    met: bool
    """Whether the requirement is met; not measured means not met."""


class Result(Row):
    """Result file of a benchmark."""

    name: str
    """Name of the benchmark, and of the file."""
    command: str
    """Command to run it again."""
    started: datetime
    """Start, UTC."""
    commit: str
    """Commit of the code, with + if files differ from it; empty outside a repository."""
    seed: int
    """Seed of all random choices."""
    machine: Machine
    """The machine."""
    bars: tuple[Bar, ...]
    """The requirements."""
    samples: list[dict[str, Any]]
    """Raw measurements, one row each."""


def _bar(relation: Relation, name: str, measured: float | None, target: float, unit: str = "") -> Bar:
    met = measured is not None and _MEETS[relation](measured, target)
    return Bar(name=name, measured=measured, target=target, relation=relation, unit=unit, met=met)


at_least = partial(_bar, "at least")
at_most = partial(_bar, "at most")
above = partial(_bar, "above")


def machine() -> Machine:
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = ""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch,
    )


def commit(folder: Path = Path(__file__).parent) -> str:
    """Return the commit of `folder`, with + if tracked files differ from it; empty outside a repository."""
    found = _git(folder, "rev-parse", "--short=12", "HEAD")
    is_changed = bool(found) and bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    return f"{found}+" if is_changed else found


def write(result: Result, folder: Path) -> Path:
    """Write `folder`/<name>-<time>.json and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}-{result.started.astimezone(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(result.model_dump_json(indent=2) + "\n")
    return path


def show_bars(console: Console, bars: Sequence[Bar]) -> None:
    table = output.table("", "bar", ">measured", ">target")
    for bar in bars:
        mark = Text(MARKS[bar.met], "bold green" if bar.met else "bold red")
        table.add_row(mark, bar.name, number(bar.measured, bar.unit), f"{bar.relation} {number(bar.target, bar.unit)}")
    console.print(table)


def missed(bars: Sequence[Bar]) -> str | None:
    """Return a sentence about the missed bars for `sys.exit`; None, and so success, if all are met."""
    texts = [
        f"{bar.name} is {number(bar.measured, bar.unit)}, not {bar.relation} {number(bar.target, bar.unit)}"
        for bar in bars
        if not bar.met
    ]
    return f"missed: {'; '.join(texts)}" if texts else None


def number(value: float | None, unit: str = "") -> str:
    """Return a number with about three significant digits, and its unit; a dash for None."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g} {unit}".rstrip()
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}".rstrip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            ["git", "-C", str(folder), *arguments],  # noqa: S607 - the caller's git
            capture_output=True,
            check=False,
            text=True,
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

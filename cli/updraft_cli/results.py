"""What every measurement of ours says besides its numbers: machine, commit, and bars with their verdicts.

A bar is met or it is not; one that could not be measured is not met. Benchmarks write a `Result` as JSON and print its
bars as one table; the demo's report uses the same parts.
"""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.text import Text

from updraft_cli import output

MARKS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}"}

_GIT_TIMEOUT_S = 5.0


class Row(BaseModel):
    """A part of a result file: never changed once made; the docstrings are its reference."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Machine(Row):
    """Where it was measured."""

    processor: str
    """Name of the processor, as Linux gives it."""
    cores: int
    """Logical cores that this process may use."""
    memory_gb: float
    """Memory in 10^9 bytes."""
    system: str
    """Operating system and kernel."""
    python: str
    """Version of Python."""
    torch: str
    """Version of torch; empty where it is not installed."""


class Bar(Row):
    """Something that has to hold, and whether it does."""

    name: str
    """What is compared."""
    measured: float | None
    """The number found; null where the run did not get that far."""
    target: float
    """The number it is held against."""
    relation: Literal["at least", "at most", "above"]
    """How `measured` has to stand to `target`."""
    unit: str
    """Of both numbers; may be empty."""
    met: bool
    """The verdict; not measured is not met."""


class Result(Row):
    """What a benchmark writes."""

    name: str
    """The question; also the name of the file."""
    command: str
    """How to run it again."""
    started: datetime
    """When it began, UTC."""
    commit: str
    """Commit of the code, with + where files differ from it; empty outside a repository."""
    seed: int
    """Of everything that was drawn."""
    machine: Machine
    """Where it ran."""
    bars: tuple[Bar, ...]
    """What had to hold."""
    samples: list[dict[str, Any]]
    """Raw measurements, one row each."""


def at_least(name: str, measured: float | None, target: float, unit: str = "") -> Bar:
    """Return a bar that is met from `target` on upwards."""
    met = measured is not None and measured >= target
    return Bar(name=name, measured=measured, target=target, relation="at least", unit=unit, met=met)


def at_most(name: str, measured: float | None, target: float, unit: str = "") -> Bar:
    """Return a bar that is met up to `target`."""
    met = measured is not None and measured <= target
    return Bar(name=name, measured=measured, target=target, relation="at most", unit=unit, met=met)


def above(name: str, measured: float | None, target: float, unit: str = "") -> Bar:
    """Return a bar that is met beyond `target`, not by reaching it."""
    met = measured is not None and measured > target
    return Bar(name=name, measured=measured, target=target, relation="above", unit=unit, met=met)


def machine() -> Machine:
    """Return this machine."""
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
    """Return the commit that `folder` is at, with + where tracked files differ from it; empty outside a repository."""
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
    """Print the bars as a table."""
    table = output.table("", "bar", ">measured", ">target")
    for bar in bars:
        mark = Text(MARKS[bar.met], "bold green" if bar.met else "bold red")
        table.add_row(mark, bar.name, number(bar.measured, bar.unit), f"{bar.relation} {number(bar.target, bar.unit)}")
    console.print(table)


def missed(bars: Sequence[Bar]) -> str | None:
    """Return a sentence on the bars that are not met, for `sys.exit`; None, and so success, if all are."""
    told = [
        f"{bar.name} is {number(bar.measured, bar.unit)}, not {bar.relation} {number(bar.target, bar.unit)}"
        for bar in bars
        if not bar.met
    ]
    return f"missed: {'; '.join(told)}" if told else None


def number(value: float | None, unit: str = "") -> str:
    """Return a number with three significant digits or more, and its unit; a dash for none."""
    if value is None:
        return "-"
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

"""The parts of a benchmark, of which a command runs some. Shared by both servers' benchmarks."""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Line, Measurements
from bench.tap.arms import SEED
from rich.console import Console

_progress = Console(stderr=True, style="dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The contribution of a part to the result."""

    lines: Sequence[Line]
    samples: Sequence[dict[str, Any]]
    figures: Sequence[str]


def measured(parts: Mapping[str, Callable[[argparse.Namespace, Path], Part]], plan: argparse.Namespace) -> Measurements:
    """The chosen parts, one after the other, each with the plan and a folder of all."""
    with tempfile.TemporaryDirectory(prefix="updraft-") as folder:  # short enough for a Unix socket
        taken = [_told(part(plan, Path(folder))) for name, part in parts.items() if name in plan.only]
    return Measurements(
        seed=SEED,
        lines=[line for part in taken for line in part.lines],
        samples=[sample for part in taken for sample in part.samples],
        figures=[figure for part in taken for figure in part.figures],
    )


def _told(part: Part) -> Part:
    """The same part, whose figures are on the screen whatever becomes of later parts."""
    for figure in (*part.figures, *(f"{line.bar.name}: {line.bar.measured} {line.bar.unit}" for line in part.lines)):
        _progress.print(figure, markup=False)
    return part

"""An SGLang plugin for the bench: the scheduler writes down when it has paused and when it continues.

It runs inside the server, which has none of our packages, so this file is copied into a folder on PYTHONPATH.
`time.monotonic` is the same clock in all processes of a machine. The answers to the HTTP calls are not enough, because SGLang
answers a pause before the scheduler gets it, while the step before it still runs.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "UPDRAFT_BENCH_PAUSES"
"""Names the file to write to."""

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_ENTRY_POINTS = f"[sglang.srt.plugins]\nupdraft_pause_clock = {Path(__file__).stem}:register\n"


def register() -> None:
    """SGLang calls this."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415 - in the server only

    path = Path(os.environ[VARIABLE])
    for method in ("pause_generation", "continue_generation"):
        HookRegistry.register(f"{_SCHEDULER}.{method}", _writing_to(path), HookType.AROUND)


def _writing_to(path: Path) -> Callable[..., Any]:
    def hook(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        with path.open("a") as file:
            file.write(f"{time.monotonic()}\n")
        return result

    return hook


def write(folder: Path) -> Path:
    """Write the plugin to `folder` as an installed package."""
    about = folder / "updraft_pause_clock-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: updraft_pause_clock\nVersion: 0\n")
    (about / "entry_points.txt").write_text(_ENTRY_POINTS)
    (folder / Path(__file__).name).write_text(Path(__file__).read_text())
    return folder


def read(path: Path) -> list[tuple[float, float]]:
    """When the scheduler had paused and when it continued, per pause."""
    times = [float(line) for line in path.read_text().splitlines()]
    return list(zip(times[::2], times[1::2], strict=True))

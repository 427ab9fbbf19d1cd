"""What the registry's process and this one, which holds the pods, take: processor time, memory, open files."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from updraft_chassis.errors import Exhausted

_RESET_PEAK = "5"
_OTHER_FILES = 256
"""Of an interpreter, its libraries, a catalogue, and the readers that are sent to at once."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """Of a stretch of time; known when its block ends."""

    seconds: float = 0.0
    registry_cpu_s: float = 0.0
    pods_cpu_s: float = 0.0
    peak_bytes: int = 0
    """Most resident memory of the registry in that time, as the kernel noted it."""

    @property
    def cpu_percent(self) -> float:
        """Of one core, by the registry."""
        return 100 * self.registry_cpu_s / self.seconds


@contextmanager
def measured(registry: psutil.Process) -> Iterator[Usage]:
    """Measure what runs in the block."""
    usage, mine, began_s = Usage(), psutil.Process(), time.perf_counter()
    registry_s, pods_s = _cpu_s(registry), _cpu_s(mine)
    Path(f"/proc/{registry.pid}/clear_refs").write_text(_RESET_PEAK)
    yield usage
    usage.seconds = time.perf_counter() - began_s
    usage.registry_cpu_s, usage.pods_cpu_s = _cpu_s(registry) - registry_s, _cpu_s(mine) - pods_s
    usage.peak_bytes = _peak_bytes(registry)


def allow_files(num_pods: int) -> None:
    """Let this process, and those that it starts, open a connection for each of so many pods.

    Exhausted where the limit of open files may not be raised that far.
    """
    needed, (_, hard) = num_pods + _OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise Exhausted(
            f"{num_pods} pods are as many connections, which takes {needed} open files in each process; at most {hard} are "
            f"allowed here: raise that (ulimit -Hn, or --ulimit nofile= of a container), or ask for fewer with --pods"
        )
    # All that is allowed: a connection that is tried again has two for a while.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _peak_bytes(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(kibibytes)

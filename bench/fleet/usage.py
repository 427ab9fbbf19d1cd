"""CPU time, memory and open files of the registry's process, and of this one, which runs the pods."""

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
"""For the interpreter, its libraries, the catalogue, and concurrent readers."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """Usage during a block; complete when the block ends."""

    seconds: float = 0.0
    registry_cpu_s: float = 0.0
    pods_cpu_s: float = 0.0
    peak_bytes: int = 0
    """Peak resident memory of the registry, from the kernel."""

    @property
    def cpu_percent(self) -> float:
        """CPU time of the registry, as a share of one core."""
        return 100 * self.registry_cpu_s / self.seconds


@contextmanager
def measured(registry: psutil.Process) -> Iterator[Usage]:
    """Measure the block."""
    usage, mine, began_s = Usage(), psutil.Process(), time.perf_counter()
    registry_s, pods_s = _cpu_s(registry), _cpu_s(mine)
    Path(f"/proc/{registry.pid}/clear_refs").write_text(_RESET_PEAK)
    yield usage
    usage.seconds = time.perf_counter() - began_s
    usage.registry_cpu_s, usage.pods_cpu_s = _cpu_s(registry) - registry_s, _cpu_s(mine) - pods_s
    usage.peak_bytes = peak_bytes(registry.pid)


def allow_files(num_pods: int) -> None:
    """Allow this process and its children a connection per pod. Exhausted if the limit of open files is too low."""
    needed, (_, hard) = num_pods + _OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise Exhausted(
            f"{num_pods} pods need {needed} open files in each process, and the limit is {hard}:"
            " raise it (ulimit -Hn, or --ulimit nofile= of a container), or use fewer --pods"
        )
    # As many as possible, because a pod that reconnects has two connections for a while.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def peak_bytes(pid: int) -> int:
    """The largest resident size of a process since it started, or since its peak was reset."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return 1024 * int(kibibytes)

"""Memory limits are set unless the user has set them."""

import os
import subprocess
import sys

import pytest
from tests.support.freed import kept_bytes

from updraft_draft.memory import HUGE_PAGES, KERNEL_CACHES, limit, use_huge_pages

GROWTH = """
import os
from updraft_draft.memory import limit
limit(os.environ, num_kernels=64)
import torch
from torch.nn.functional import linear

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
weight = torch.ones(64, 64, dtype=torch.bfloat16)
sizes = []
for rows in range(1, 401):
    linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
    sizes.append(resident())
print(sizes[-1] - sizes[63])
"""

RETURNED = "from updraft_draft.memory import return_large_blocks; return_large_blocks(os.environ)"


def test_the_kernel_caches_have_a_limit() -> None:
    environ: dict[str, str] = {}
    limit(environ, num_kernels=64)
    assert environ == dict.fromkeys(KERNEL_CACHES, "64")


def test_limits_that_the_user_has_set_stand() -> None:
    own = dict.fromkeys(KERNEL_CACHES, "7") | {"MALLOC_ARENA_MAX": "3"}
    environ = own.copy()
    limit(environ, num_kernels=64)
    assert environ == own


@pytest.mark.parametrize("own", ["0", "1"])
def test_large_pages_are_used_unless_the_user_decides(own: str) -> None:
    environ: dict[str, str] = {}
    use_huge_pages(environ)
    assert environ == {HUGE_PAGES: "1"}
    environ = {HUGE_PAGES: own}
    use_huge_pages(environ)
    assert environ == {HUGE_PAGES: own}


def test_memory_stops_growing_with_the_number_of_shapes() -> None:
    """In a process of its own, because torch reads the limits once. Without them it grows by 0.6 MB per shape."""
    environ = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, check=True, text=True, env=environ)
    assert int(done.stdout) < 100_000_000


def test_freed_blocks_of_whole_requests_leave_no_gaps() -> None:
    """Otherwise, nearly 200 MB are kept."""
    assert kept_bytes(RETURNED) < 20_000_000


def test_a_threshold_of_the_user_stands() -> None:
    assert kept_bytes(RETURNED, MALLOC_MMAP_THRESHOLD_=str(1 << 25)) > 100_000_000

"""Memory limits of the inference process depend on its engine."""

import os
import subprocess
import sys

import pytest

FREED = """
import os, sys
from updraft_inference.process import limit_memory
limit_memory(sys.argv[1])

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before, large = resident(), [b"x" * 24_000_000]
large.clear()  # from now on, glibc would keep such blocks
for _ in range(8):
    large.append(b"x" * 24_000_000)
behind = b"x" * 100_000
large.clear()
print(resident() - before)
"""


@pytest.mark.parametrize(("engine", "are_kept"), [("torch", True), ("vllm", False)])
def test_the_torch_engine_keeps_the_memory_of_its_steps_and_an_agent_gives_it_back(
    engine: str, *, are_kept: bool
) -> None:
    """In a process of its own, because the setting stays."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FREED, engine], capture_output=True, check=True, text=True, env=environ
    )
    assert (int(done.stdout) > 100_000_000) == are_kept

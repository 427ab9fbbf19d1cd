"""How much memory a process keeps of large blocks that it has freed: glibc may keep them, with small ones between them."""

import os
import subprocess
import sys

_SCRIPT = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before, large, small = resident(), [b"x" * 24_000_000], []
large.clear()  # from now on, glibc would keep such blocks
for _ in range(8):
    large.append(b"x" * 24_000_000)
    small.append(b"x" * 100_000)  # lies behind it
large.clear()
print(resident() - before)
"""


def kept_bytes(setting: str, **variables: str) -> int:
    """Run `setting`, a statement, first. In a process of its own, because it stays set."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    script = f"import os\n{setting}\n{_SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True, env=environ)
    return int(done.stdout)

"""The console as a process of its own, about a stack on this machine."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.wait import LONG_S


@contextmanager
def console(data: Path) -> Iterator[str]:
    """`updraft ui` about the stack on a data folder; the address that it prints."""
    command = [sys.executable, "-m", "updraft_cli", "ui", "--no-browser", "--port", "0", "--data", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(word for line in process.stdout for word in line.split() if "token=" in word)
        finally:
            process.terminate()
            process.wait(LONG_S)

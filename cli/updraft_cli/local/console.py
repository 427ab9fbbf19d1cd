"""The console beside a stack: a process of its own, so that the supervisor of the stack serves no HTTP and calls no gRPC."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from updraft_cli.local import tether

_STOP_S = 5.0


@contextmanager
def console(data: Path, registry: str, on_ready: Callable[[str], None]) -> Iterator[None]:
    """Run `updraft ui` on a stack's data folder for the length of a block; `on_ready` gets its address, from a thread.

    A console that does not start is no reason to stop anything else: `on_ready` is then never called.
    """
    command = [sys.executable, "-m", "updraft_cli", "ui", "--no-browser", "--data", str(data), "--registry", registry]
    process = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, on_ready), name="console", daemon=True)
    reader.start()
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stdout.close()


def _read(stdout: IO[str], on_ready: Callable[[str], None]) -> None:
    if address := stdout.readline().strip():
        on_ready(address)

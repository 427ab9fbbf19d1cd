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
def console(
    data: Path, registry: str, on_ready: Callable[[str], None], on_failure: Callable[[str], None]
) -> Iterator[None]:
    """Run `updraft ui` on a stack's data folder for the length of a block.

    From a thread, `on_ready` gets its address. A console that does not start or that ends is no reason to stop anything
    else: `on_failure` gets a sentence about it.
    """
    command = [sys.executable, "-m", "updraft_cli", "ui", "--no-browser", "--data", str(data), "--registry", registry]
    log = data / "logs" / "console.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C goes to the supervisor alone
            text=True,
        )
    assert process.stdout is not None
    is_ending = threading.Event()

    def follow(stdout: IO[str]) -> None:
        if address := stdout.readline().strip():
            on_ready(address)
            stdout.read()  # until its end
        if not is_ending.is_set():
            on_failure(f"The console has ended, and everything else goes on. The reason is in {log}.")

    reader = threading.Thread(target=follow, args=(process.stdout,), name="console", daemon=True)
    reader.start()
    try:
        yield
    finally:
        is_ending.set()
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stdout.close()

"""`kubectl updraft ui` as a person starts it, and a client of its pages."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.kubectl import Kubectl
from tests.support.console import Browser
from tests.support.wait import LONG_S


@contextmanager
def console(kubectl: Kubectl) -> Iterator[Browser]:
    """The console of a user, which runs for the length of a block."""
    command = kubectl.command("updraft", "ui", "--no-browser")
    process = subprocess.Popen(
        command, env=kubectl.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), process.stderr.read()
        with Browser(address) as browser:
            yield browser
    finally:
        process.terminate()
        process.communicate(timeout=LONG_S)
    assert process.returncode == 0, "it ended in order, so no token stays in a file"

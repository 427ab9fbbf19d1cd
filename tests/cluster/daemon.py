"""A program in the background: its output in a file, its early death an error with the last lines of that file."""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.wait import LONG_S, wait_until

_TAIL_CHARACTERS = 2_000


class StartError(Exception):
    """A part of the cluster did not come up; the message has the end of its log."""


class Daemon:
    """`command`, appending to `logs/<name>.log`, with only the open files named in `descriptors`.

    The kernel kills it when the thread that started it has gone, unless it `is_detached`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        logs: Path,
        *,
        descriptors: Sequence[int] = (),
        is_detached: bool = False,
    ) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*(() if is_detached else ("setpriv", "--pdeathsig=KILL", "--")), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is for whoever started it
            )

    def wait_until(self, condition: Callable[[], bool], *, what: str, timeout_s: float = LONG_S) -> None:
        """Return once `condition()` is true; raise StartError at once when the program ends before that."""

        def is_met() -> bool:
            status = self.process.poll()
            if status is not None:
                raise StartError(f"{self.name} ended with status {status}:\n{self.tail()}")
            return condition()

        try:
            wait_until(is_met, timeout_s=timeout_s, what=what)
        except TimeoutError as error:
            raise StartError(f"{error}; {self.name} says:\n{self.tail()}") from error

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-_TAIL_CHARACTERS:]

    def kill(self) -> None:
        """End it at once: nothing that a test's cluster holds is worth a graceful end."""
        self.process.kill()
        self.process.wait()

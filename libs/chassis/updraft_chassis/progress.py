"""Progress of a program that another one started: a line of JSON on stdout for each change."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done` of `total` parts of an activity. `tokens`: how many this process has generated or trained on so far. `note` is a
    sentence for the person, to be shown once."""

    activity: str
    done: int
    total: int
    tokens: int = 0
    note: str = ""

    @classmethod
    def parse(cls, line: str) -> Self:
        return cls(**json.loads(line))


Report = Callable[[Progress], None]

_STDOUT, _STDERR = 1, 2


@contextmanager
def on_stdout() -> Iterator[Report]:
    """Yield a report that writes to stdout. Anything else that is written there goes to stderr, also from C code."""
    sys.stdout.flush()
    with os.fdopen(os.dup(_STDOUT), "w") as lines:

        def report(progress: Progress) -> None:
            lines.write(json.dumps(asdict(progress)) + "\n")
            lines.flush()

        os.dup2(_STDERR, _STDOUT)
        try:
            yield report
        finally:
            sys.stdout.flush()
            os.dup2(lines.fileno(), _STDOUT)

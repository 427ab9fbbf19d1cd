"""Progress of a program that another one started: a line of JSON on stdout for each change."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done` of `total` parts of an activity. `tokens`: how many this process has generated so far."""

    activity: str
    done: int
    total: int
    tokens: int = 0

    def write(self) -> None:
        sys.stdout.write(json.dumps(asdict(self)) + "\n")
        sys.stdout.flush()

    @classmethod
    def parse(cls, line: str) -> Self:
        return cls(**json.loads(line))


Report = Callable[[Progress], None]

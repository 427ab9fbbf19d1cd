"""The recorded run of recorded.json, which `tools.pictures.record` writes."""

import json
from dataclasses import dataclass
from pathlib import Path

_PATH = Path(__file__).with_name("recorded.json")


@dataclass(frozen=True, slots=True)
class Step:
    """A verify step: the texts of draft tokens, how many were accepted, and the target's own token after them."""

    version: int
    drafts: list[str]
    accepted: int
    bonus: str
    ended_ms: float


@dataclass(frozen=True, slots=True)
class Swap:
    """Times in milliseconds after the first token; `pause` is a duration."""

    began: float
    ended: float
    pause: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request, with a swap in it."""

    question: str
    steps: list[Step]
    swap: Swap


def read() -> Recorded:
    """Read the file."""
    data = json.loads(_PATH.read_text(encoding="utf-8"))
    steps = [Step(**step) for step in data["steps"]]
    return Recorded(question=data["question"], steps=steps, swap=Swap(**data["swap"]))

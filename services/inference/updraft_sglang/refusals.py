"""How a refusal for good is told apart from a trouble of the server: by a mark in the sentence of the answer.

SGLang's answer to an update has a sentence and no field of ours, and joins those of all ranks. What has no mark says nothing
about the draft (a folder that is not to be seen, no memory), and is tried again.
"""

from typing import Literal

Kind = Literal["corrupt", "unfit"]
"""corrupt: bytes, as they are read there, that nobody should serve. unfit: a sound draft for another server (its shape, its
vocabulary)."""

_MARKS: dict[Kind, str] = {kind: f"[updraft: {kind} draft]" for kind in ("corrupt", "unfit")}


def marked(kind: Kind, sentence: str) -> str:
    """The sentence of an answer."""
    return f"{_MARKS[kind]} {sentence}"


def read(answer: str) -> tuple[Kind | None, str]:
    """What an answer says of the draft, and its sentence without marks. Of several ranks' the gravest counts."""
    found = [kind for kind, mark in _MARKS.items() if mark in answer]
    for mark in _MARKS.values():
        answer = answer.replace(f"{mark} ", "")
    return (found[0] if found else None), answer

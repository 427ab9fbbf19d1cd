"""Options of a recording. Imports nothing slow, so that bad options are reported first."""

from dataclasses import dataclass
from pathlib import Path

from updraft_chassis.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How prompts are answered. `max_context`: tokens of prompt and answer together, at most."""

    max_tokens: int
    temperature: float
    seed: int
    max_context: int

    def __post_init__(self) -> None:
        if self.max_tokens >= self.max_context:
            raise InvalidInput(
                f"answers of {self.max_tokens} tokens leave no room for a prompt in a context of {self.max_context}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """`num_self_play` requests that the model writes, and those of the file `prompts`, go to `folder`."""

    model: Path
    folder: Path
    num_self_play: int
    prompts: Path | None
    answers: AnswerOptions

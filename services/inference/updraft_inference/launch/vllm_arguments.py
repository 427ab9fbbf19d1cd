"""The arguments of a stock vLLM server for Updraft."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from updraft_chassis.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM serves. `num_seqs` and `max_context` are None for vLLM's own choice; `extra` comes last and overrides."""

    model: Path
    name: str
    host: str
    port: int
    dtype: str
    num_steps: int
    num_seqs: int | None
    max_context: int | None
    is_eager: bool
    """Without compiled graphs, which swaps on a CPU need."""
    drain_s: float
    extra: Sequence[str]


def speculation(draft: Path, num_steps: int) -> list[str]:
    """The initial draft, and `num_steps` draft tokens per step. Raises InvalidInput without steps."""
    if num_steps < 1:
        raise InvalidInput(
            "vLLM needs a lookahead of at least 1, because rows are captured when drafts are verified;"
            " set UPDRAFT_INFERENCE_LOOKAHEAD"
        )
    config = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": num_steps}
    return ["--speculative-config", json.dumps(config)]


def serving(options: VllmOptions, draft: Path) -> list[str]:
    """All arguments for a server that starts with this draft."""
    return [
        *("--model", str(options.model), "--served-model-name", options.name),
        *("--host", options.host, "--port", str(options.port), "--dtype", options.dtype),
        *(("--max-num-seqs", str(options.num_seqs)) if options.num_seqs else ()),
        *(("--max-model-len", str(options.max_context)) if options.max_context else ()),
        *(("--enforce-eager",) if options.is_eager else ()),
        *("--shutdown-timeout", str(math.ceil(options.drain_s))),
        *speculation(draft, options.num_steps),
        *options.extra,
    ]

"""What a stock SGLang server is started with so that Updraft can serve with it: the one list.

The operator holds a copy, for deployables do not import each other; a test keeps them equal.
"""

from collections.abc import Sequence
from pathlib import Path

from updraft_chassis.errors import InvalidInput
from updraft_draft.config import TargetConfig
from updraft_inference.sglang_engine.draft_swap import LOADER

MARGIN = 8
"""Tokens of its context that the server gives to no request, beside those that it keeps for drafts."""

SOCKET_VARIABLE = "UPDRAFT_SGLANG_SOCKET"
"""Where the plugin finds the agent's socket; without it the plugin does nothing."""


def speculation(seed: Path, num_steps: int) -> list[str]:
    """The draft to start with, chains of `num_steps` drafts, and the way to change it. InvalidInput without steps."""
    if num_steps < 1:
        raise InvalidInput(
            "a lookahead of 0 leaves nothing to learn from with SGLang: its states are seen where drafts are verified;"
            " set UPDRAFT_INFERENCE_LOOKAHEAD to 1 or more"
        )
    return [
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(seed)),
        *("--speculative-num-steps", str(num_steps), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(num_steps + 1)),
        *("--custom-weight-loader", LOADER, "--enable-metrics"),
    ]


def serving(model: Path, *, port: int, num_slots: int, dtype: str, extra: Sequence[str]) -> list[str]:
    """The target, on a port of this machine alone. `extra` comes last, and so wins."""
    return [
        *("--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--max-running-requests", str(num_slots), "--dtype", dtype, "--incremental-streaming-output"),
        *extra,
    ]


def context(model: Path, max_context: int, num_steps: int) -> list[str]:
    """A context in which requests of `max_context` tokens fit, as far as the model goes."""
    limit = TargetConfig.from_folder(model).max_position
    return ["--context-length", str(min(limit, max_context + num_steps + 1 + MARGIN))]

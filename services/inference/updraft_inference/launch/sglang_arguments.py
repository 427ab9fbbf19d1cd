"""The arguments of a stock SGLang server for Updraft.

The operator has a copy, because deployables do not import each other; a test keeps them equal.
"""

from collections.abc import Sequence
from pathlib import Path

from updraft_artifacts.model_folder import describe
from updraft_chassis.errors import InvalidInput
from updraft_sglang.weights import LOADER

MARGIN = 8
"""Tokens of the context that the server gives to no request, in addition to those reserved for drafts."""


def speculation(initial_draft: Path, num_steps: int) -> list[str]:
    """The initial draft, `num_steps` draft tokens per step, and the loader for swaps. Raises InvalidInput without steps."""
    if num_steps < 1:
        raise InvalidInput(
            "SGLang needs a lookahead of at least 1, because hidden states are captured when drafts are verified;"
            " set UPDRAFT_INFERENCE_LOOKAHEAD"
        )
    return [
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(initial_draft)),
        *("--speculative-num-steps", str(num_steps), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(num_steps + 1)),
        *("--custom-weight-loader", LOADER, "--enable-metrics"),
    ]


def serving(model: Path, *, port: int, num_slots: int, dtype: str, extra: Sequence[str]) -> list[str]:
    """The target, on a local port. `extra` comes last and therefore overrides."""
    return [
        *("--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--max-running-requests", str(num_slots), "--dtype", dtype, "--incremental-streaming-output"),
        *extra,
    ]


def context(model: Path, max_context: int, num_steps: int) -> list[str]:
    """A context that fits requests of `max_context` tokens, limited by the model."""
    limit = describe(model).max_position
    return ["--context-length", str(min(limit, max_context + num_steps + 1 + MARGIN))]

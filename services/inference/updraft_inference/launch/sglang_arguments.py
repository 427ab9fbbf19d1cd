"""The arguments of a stock SGLang server for Updraft.

The operator has a copy, because deployables do not import each other; a test keeps them equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from updraft_artifacts.model_folder import describe
from updraft_chassis.errors import InvalidInput
from updraft_sglang.weights import LOADER

MARGIN = 8
"""Tokens of the context that the server gives to no request, in addition to those reserved for drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangOptions:
    """How SGLang serves. `num_slots` and `max_context` are None for SGLang's own choice; `extra` comes last and overrides."""

    model: Path
    name: str
    host: str
    port: int
    dtype: str
    num_steps: int
    num_slots: int | None
    max_context: int | None
    config: Path | None
    """The file with the admin key; see `admin_key`."""
    extra: Sequence[str]


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


def serving(options: SglangOptions, draft: Path) -> list[str]:
    """All arguments for a server that starts with this draft."""
    return [
        *("--model-path", str(options.model), "--served-model-name", options.name),
        *("--host", options.host, "--port", str(options.port), "--dtype", options.dtype),
        *(("--max-running-requests", str(options.num_slots)) if options.num_slots else ()),
        *speculation(draft, options.num_steps),
        *(("--config", str(options.config)) if options.config else ()),
        *(context(options.model, options.max_context, options.num_steps) if options.max_context else ()),
        *options.extra,
    ]


def context(model: Path, max_context: int, num_steps: int) -> list[str]:
    """A context that fits requests of `max_context` tokens, limited by the model."""
    limit = describe(model).max_position
    return ["--context-length", str(min(limit, max_context + num_steps + 1 + MARGIN))]

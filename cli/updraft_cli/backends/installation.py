"""Everything that runs, as plain values: speculators, and for `updraft up` its processes, serving and training."""

from dataclasses import dataclass, field, replace
from typing import Self

from updraft_cli.backends.speculators import Speculator
from updraft_cli.local.process import ProcessState


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Counts of the inference process, since its start."""

    kernels: str
    """Variant of the C++ kernels that the built-in engine uses; "torch" if it uses none, empty for other engines."""
    draft_version: int
    swaps: int
    running_requests: int
    queued_requests: int
    output_tokens: int
    acceptance_length: dict[str, float]
    """Tokens per verify step by drafter, mean over requests."""
    expected_survival: dict[str, dict[str, float]]
    """By drafter and position: probability that the drafts up to there are accepted; the lookahead follows it."""
    verify_ms: dict[str, float]
    """Milliseconds per verify step, by the number of rows."""
    captured: int
    capture_dropped: dict[str, int]
    """Dropped traces by reason."""
    lookahead: float | None = None
    """Draft tokens per step that the engine chose last."""
    granted_tokens_per_s: float | None = None
    """Captured tokens per second that the registry grants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Counts of the trainer, since its start."""

    optimizer_steps: int
    trained_tokens: int
    samples: dict[str, int]
    """Samples admitted, by split: for training, for evaluation."""
    loss: float | None
    acceptance_length: dict[str, float]
    """Tokens per verify step on held-out requests, of candidate and baseline."""
    published: dict[str, int]
    """Published candidates by outcome."""
    gain: dict[str, float] = field(default_factory=dict)
    """Relative gain of the candidate over the baseline at the last estimate: mean, low, high."""
    trained_length: float | None = None
    """Tokens per verify step of the candidate on requests that it was trained on."""
    replay: dict[str, int] = field(default_factory=dict)
    """Stored requests by pool."""
    lag_s: float | None = None
    """Age of the newest stored trace when it was stored; the largest of all shards."""
    demand_tokens_per_s: float | None = None
    """Captured tokens per second that the trainer can use."""
    refused: dict[str, int] = field(default_factory=dict)
    """Traces that were not stored, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    namespace: str = ""
    """Empty: of all namespaces, or of a registry."""
    processes: tuple[ProcessState, ...] | None = None
    """None: it runs in a cluster."""
    speculators: tuple[Speculator, ...] | None
    """None: the registry does not answer."""
    serving: Serving | None = None
    """None, like `training`: it does not answer, or it runs in a cluster."""
    training: Training | None = None
    speculator: str = ""
    """The one that serving and training belong to; empty: not known."""

    def about(self, speculator: str) -> Self:
        """Return this without the metrics of processes that belong to another speculator."""
        is_only = not self.speculator and len(self.speculators or ()) == 1
        return self if is_only or speculator == self.speculator else replace(self, serving=None, training=None)

"""Two ports: an engine generates, for HTTP; a holder holds a draft, for the agent of a pod. An engine is also a holder.

A holder is the source of truth: `loaded` is the draft that it holds, not the one that it was told to load. This module has only
data, checks of data, and small protocols. It does not import torch, which takes seconds.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from updraft_chassis.errors import Corrupt, InvalidInput, Unavailable
from updraft_tap.drafting.speedup import Speedup

if TYPE_CHECKING:
    import torch


class Drafter(StrEnum):
    """The proposer of draft tokens."""

    NONE = "none"
    NGRAM = "ngram"
    EAGLE3 = "eagle3"
    HYBRID = "hybrid"
    """N-gram lookup and the draft model, mixed token by token. A step has this value if both could propose its tokens."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing.

    The presence penalty is subtracted once from the logit of each token of the output, the frequency penalty per occurrence.
    The repetition penalty divides the logits of tokens of prompt and output (it multiplies those below 0).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """Minimum probability, as a fraction of the likeliest token's."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and the value added to their logits."""
    seed: int | None = None

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureParams:
    """The parts of a request that are captured.

    `payload`: the hidden states of the last `prompt_rows` prompt positions and of all output positions, and of up to
    `counterfactual_rows` rows after the rejected draft token in each verify step.
    """

    payload: bool = False
    prompt_rows: int = 0
    counterfactual_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt to continue."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    client: str = ""
    """The client. State that an engine keeps to speed up later requests serves the same client only."""
    sampling: SamplingParams = SamplingParams()
    ignore_eos: bool = False
    drafter: Drafter | None = None
    """None: the engine's own choice."""
    lookahead: int | None = None
    """Number of draft tokens per step, at most; None: the engine's own choice."""
    json_schema: str | None = None
    """A JSON schema, as JSON text. The output follows it, or is the beginning of a text that does."""
    top_logprobs: int | None = None
    """Number of likeliest tokens to return with each output token and its log-probability; None: return neither."""
    capture: CaptureParams = CaptureParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyStep:
    """One verify step of one request; see updraft.trace.v1.Step. `draft_log_probs` is empty where an engine hides them.

    `looked_up`: indices of the draft tokens of a `hybrid` step that n-gram lookup proposed.
    """

    start: int
    accepted: int
    draft_ids: tuple[int, ...]
    draft_log_probs: tuple[float, ...]
    target_log_probs: tuple[float, ...]
    batch_size: int
    duration_s: float
    drafter: Drafter
    draft_version: int
    looked_up: tuple[int, ...] = ()

    @property
    def emitted(self) -> int:
        """Tokens that the step yielded, at most; a stop token may have cut it."""
        return self.accepted + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums:
    """Sums over the verify steps of a request that one drafter and one draft version proposed.

    `proposed`, `accepted`: number of steps by draft position. `tokens` int64 [steps] that each step gave, without those that
    the end of the request cut off, and its `seconds` float64 [steps].
    """

    drafter: Drafter
    draft_version: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    tokens: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]

    @classmethod
    def of(cls, steps: Sequence[VerifyStep], num_output: int) -> Self:
        """`steps` has at least one, all of one drafter and version."""
        starts = np.fromiter((step.start for step in steps), np.int64, len(steps))
        emitted = np.fromiter((step.emitted for step in steps), np.int64, len(steps))
        return cls(
            drafter=steps[0].drafter,
            draft_version=steps[0].draft_version,
            proposed=_by_position(len(step.draft_ids) for step in steps),
            accepted=_by_position(step.accepted for step in steps),
            tokens=np.minimum(emitted, num_output - starts).clip(min=0),
            seconds=np.fromiter((step.duration_s for step in steps), np.float64, len(steps)),
        )

    @property
    def verify_steps(self) -> int:
        return len(self.tokens)


def _by_position(lengths: Iterable[int]) -> tuple[int, ...]:
    """How many of the lengths reach each position."""
    counts = Counter(lengths)
    return tuple(
        sum(num for length, num in counts.items() if length > position) for position in range(max(counts, default=0))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The k likeliest target tokens of each row: ids int64 [rows, k], their log_probs float32 [rows, k] (natural
    logarithm, temperature 1), and log_sum_exp float32 [rows] of all the row's logits."""

    ids: "torch.Tensor"
    log_probs: "torch.Tensor"
    log_sum_exp: "torch.Tensor"

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.log_probs.nbytes + self.log_sum_exp.nbytes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "TopK":
        return TopK(ids=self.ids[rows], log_probs=self.log_probs[rows], log_sum_exp=self.log_sum_exp[rows])


Teacher: TypeAlias = "torch.Tensor | TopK"
"""The target's prediction: its last hidden states [rows, hidden] after the final norm, from which logits can be computed
exactly, or its likeliest tokens where an engine exposes no more."""


class StateRows(Protocol):
    """Rows of states, [rows, columns]: a tensor, or rows that lie in several until a slice of them is made."""

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> "torch.Tensor": ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """The target's states after draft tokens that it rejected; shapes as in `HiddenStates`.

    Row i has read draft `accepted + i` of verify step `step`; row 0 has read the rejected draft token itself.
    """

    step: int
    aux: "torch.Tensor"
    teacher: Teacher

    @property
    def num_bytes(self) -> int:
        return self.aux.nbytes + self.teacher.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """The target's rows for the positions of prompt ++ output from `first_position` on.

    aux: [rows, num_aux * hidden], or `packed` by updraft_draft.tensors. The teacher has the rows from `first_teacher_row` on.
    Tensors are in the engine's dtype, on the CPU. Rows in `missing_rows` (offsets, ascending) were lost, and their content is
    arbitrary.
    """

    first_position: int
    aux: StateRows
    teacher: Teacher
    first_teacher_row: int = 0
    missing_rows: tuple[int, ...] = ()
    counterfactuals: tuple[Counterfactual, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.aux.nbytes + self.teacher.nbytes + sum(rows.num_bytes for rows in self.counterfactuals)


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedSteps:
    """Sums over the verify steps of a request that one draft version proposed, as a server reports them.

    `proposed`, `accepted`: number of steps by draft position. `duration_s` is 0 if it is not known.
    """

    draft_version: int
    verify_steps: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    tokens: int
    duration_s: float
    drafter: Drafter = Drafter.EAGLE3


@dataclass(frozen=True, kw_only=True)
class FinishedRequest:
    """The result of a request."""

    request: GenerationRequest
    output_ids: tuple[int, ...]
    steps: tuple[VerifyStep, ...]
    reason: FinishReason
    time_to_first_token_s: float
    duration_s: float
    hidden: HiddenStates | None = None
    num_cached: int = 0
    """First tokens of the prompt that came from a prefix cache."""

    @cached_property
    def sums(self) -> tuple[StepSums, ...]:
        """The sums of `steps`, in the order of the first step of each. About a microsecond per step, which is too long for an
        event loop if there are many thousands; an engine may compute them before it reports the request."""
        groups: dict[tuple[Drafter, int], list[VerifyStep]] = {}
        for kind, steps in groupby(self.steps, lambda step: (step.drafter, step.draft_version)):
            groups.setdefault(kind, []).extend(steps)
        return tuple(StepSums.of(steps, len(self.output_ids)) for steps in groups.values())

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        return len(self.output_ids)

    @property
    def num_missing_rows(self) -> int:
        return 0 if self.hidden is None else len(self.hidden.missing_rows)

    @property
    def last_version(self) -> int:
        """The last draft that proposed; 0 without any."""
        return next((step.draft_version for step in reversed(self.steps) if step.draft_version), 0)

    @property
    def num_rows(self) -> int:
        """Captured positions."""
        return 0 if self.hidden is None else len(self.hidden.aux)

    @property
    def num_context_rows(self) -> int:
        """Captured positions before the one that teaches the first output token."""
        if self.hidden is None:
            return 0
        taught = len(self.request.prompt_ids) - 1
        return min(self.num_rows, max(0, taught - self.hidden.first_position))


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedRequest:
    """Counts of a request that was served elsewhere, whether or not there is a trace of it. Times are None if not known."""

    reason: FinishReason
    num_prompt: int
    num_output: int
    sums: tuple[CountedSteps, ...]
    """In the order in which the drafts proposed."""
    duration_s: float
    time_to_first_token_s: float | None = None
    num_uncaptured: int = 0
    """Verify steps that are in no trace, although one of the request is made."""
    num_missing_rows: int = 0

    @property
    def last_version(self) -> int:
        return next((sums.draft_version for sums in reversed(self.sums) if sums.draft_version), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of an output token: natural logarithm, temperature 1, raw logits before penalties, bias, grammar and
    filters, as in vLLM. `top`: ids and log-probabilities of the likeliest tokens, likeliest first."""

    token_id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens of one request; the last delta carries `finished`. `logprobs`: one per token, if requested."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finished: FinishedRequest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderInfo:
    """Constants of what holds a draft. Fingerprints are "sha256:..."."""

    engine: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    quantization: str = ""
    """How the target's weights are quantized; "" if they are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo(HolderInfo):
    """Constants of a running engine."""

    max_context: int
    num_slots: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    kernels: str = "torch"
    """The C++ kernels: amx, vnni, avx512, avx2, neon; "torch" if none."""


def check_limits(request: GenerationRequest, info: EngineInfo) -> None:
    """Raises InvalidInput for a request that no engine with this context and vocabulary can serve."""
    num_prompt, limit = len(request.prompt_ids), info.max_context
    if not num_prompt:
        raise InvalidInput("the prompt is empty")
    if request.max_tokens < 1:
        raise InvalidInput(f"max_tokens is {request.max_tokens}; it must be at least 1")
    if num_prompt + request.max_tokens > limit:
        raise InvalidInput(
            f"{num_prompt} prompt tokens and {request.max_tokens} new ones exceed the context of {limit} tokens"
        )
    if not all(0 <= token < info.vocab_size for token in request.prompt_ids):
        raise InvalidInput(f"a prompt token is outside the vocabulary of {info.vocab_size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCheckpoint:
    """A verified checkpoint folder (model.safetensors, config.json)."""

    version: int
    folder: Path
    tensors_digest: str


class TargetChangedError(Corrupt):
    """The swap changed weights of the target, which it must never touch; the old draft is served again, unless
    putting it back failed."""


class OtherShapeError(Unavailable):
    """The draft is valid for this target, but has another shape than the one that the server started with, so the server must
    restart to serve it, now or later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDraft:
    """The draft that the engine holds. `tensors_digest` is computed from the engine's own tensors; "" with version 0."""

    version: int = 0
    tensors_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapResult:
    """Result of a swap. `pause_s`: how long decoding paused for it."""

    loaded: LoadedDraft
    pause_s: float
    target: str = ""
    """Digest of the target's weights that a server compared before and after; "" if it compared none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy the engine is now."""

    running: int = 0
    queued: int = 0
    used_tokens: int = 0
    lookahead: int = 0
    """Draft tokens per step that the engine chose last."""
    cached_tokens: int = 0
    """Prompt tokens so far that came from the prefix cache."""


class LookaheadEstimates(Protocol):
    """The estimates by which an engine chooses its lookahead."""

    def survival(self, drafter: Drafter, length: int) -> float:
        """Probability that the first `length` drafts of a proposal are accepted; NaN while there was none."""
        ...

    def step_seconds(self, rows: int) -> float:
        """Seconds to verify so many rows, all sequences together."""
        ...


class CaptureLoss(StrEnum):
    """Why part of a trace is missing."""

    QUEUE = "queue"
    """The server's queue to the agent was full; a message was lost."""
    MEMORY = "memory"
    """Running requests held too many rows already; those of a step, or of a forward over a prompt, were dropped."""
    UNKNOWN = "unknown_request"
    """The message belongs to a request that has ended, or to another agent."""
    MALFORMED = "malformed"
    """The message cannot be parsed."""


class DraftHolder(Protocol):
    """Drafts with one draft, which it swaps between two decode steps: an engine, or a server of somebody else's.

    Errors are those of `updraft_chassis.errors`.
    """

    @property
    def info(self) -> HolderInfo: ...

    @property
    def loaded(self) -> LoadedDraft: ...

    @property
    def load(self) -> EngineLoad:
        """All zero where it is not known."""
        ...

    @property
    def speedups(self) -> Mapping[int, Speedup]:
        """By the smallest batch size of the load, see `speedup.LOADS`; 0: of all traffic. Empty while nothing is known."""
        ...

    @property
    def faults(self) -> Mapping[int, int]:
        """Steps so far in which drafting failed, by draft version. A fault costs drafts, never a request."""
        ...

    @property
    def device(self) -> str:
        """Device that it runs on, such as "cpu" or "cuda:0"; empty while it is not known."""
        ...

    @property
    def capture_problem(self) -> str:
        """Why nothing can be captured, in one sentence; empty if capture works."""
        ...

    @property
    def capture_losses(self) -> Mapping[CaptureLoss, int]:
        """Parts of traces lost so far. The requests themselves are not affected."""
        ...

    def compare(self, *, is_comparing: bool) -> None:
        """Say whether drafts are compared now, so that an engine that mixes proposers shows more of each draft alone."""
        ...

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """Use this draft from the next step on; None: no draft. Running requests continue.

        Its vocabulary may be another one.

        Raises Corrupt (weights not finite, or another digest), InvalidInput (another target or shape) or OtherShapeError (a
        restart of the server helps); the old draft then stays in use.
        """
        ...

    async def rehash(self) -> LoadedDraft:
        """Hash the draft that the engine holds again, without pausing it, and update `loaded`."""
        ...


class Engine(DraftHolder, Protocol):
    """Continues prompts, and holds the draft for that."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def lookahead_estimates(self) -> LookaheadEstimates: ...

    @property
    def is_alive(self) -> bool:
        """False: the engine has failed permanently, and the process should end."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Yield tokens as they are generated. Closing the generator early cancels the request and frees its slot.

        The engine never waits for the reader; it buffers up to max_tokens tokens.

        Raises InvalidInput (prompt too long, limits out of range, a schema or a parameter that this engine does not support),
        Exhausted (queue full), Unavailable (stopping). No parameter is silently ignored.
        """
        ...


FinishedSink = Callable[[FinishedRequest], None]
"""Called on the engine's thread for every request that ended. It must return at once and never raise."""

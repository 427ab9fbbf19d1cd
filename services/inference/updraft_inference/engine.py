"""What the edges (HTTP, capture, fleet) need of an engine, whatever runs inside it.

The engine's own word is the truth: `loaded` is what it holds, not what it was asked for. Everything here is data or a
small protocol; no torch, so that an adapter for another engine needs none.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch


class Drafter(StrEnum):
    """Who proposes tokens."""

    NONE = "none"
    NGRAM = "ngram"
    EAGLE3 = "eagle3"
    HYBRID = "hybrid"
    """Of a request or an engine, never of a step: whichever of the two promises more, step by step."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing.

    Presence and frequency penalties are subtracted from the logits of tokens of the output, once and per occurrence; the
    repetition penalty divides (or, below 0, multiplies) those of prompt and output. `logit_bias` adds to single tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """Least probability, as a fraction of the likeliest token's."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added."""
    seed: int | None = None

    @property
    def has_penalties(self) -> bool:
        """What was said changes what is likely."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureParams:
    """What the caller wants to see of a request when it ends.

    `payload` asks for hidden states of the last `prompt_rows` prompt positions and of all output positions, and of up to
    `counterfactual_rows` rows after the rejection of a draft's token in each verify step.
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
    """Who asks: what an engine keeps of a request, so that later ones are faster, is of use to the same client only."""
    sampling: SamplingParams = SamplingParams()
    ignore_eos: bool = False
    drafter: Drafter | None = None
    """None: the engine's own choice."""
    lookahead: int | None = None
    """Largest number of drafts a step; None: the engine's own choice."""
    json_schema: str | None = None
    """A JSON schema, as JSON: the output is a text that it allows, or the beginning of one."""
    top_logprobs: int | None = None
    """Likeliest tokens to tell with each output token, beside its own log-probability; None: tell neither."""
    capture: CaptureParams = CaptureParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyStep:
    """One verify step of one request; see updraft.trace.v1.Step. `draft_log_probs` is empty where an engine hides them."""

    start: int
    accepted: int
    draft_ids: tuple[int, ...]
    draft_log_probs: tuple[float, ...]
    target_log_probs: tuple[float, ...]
    batch_size: int
    duration_s: float
    drafter: Drafter
    draft_version: int

    @property
    def emitted(self) -> int:
        """Tokens that the step gave, at most (a stop token may have cut it)."""
        return self.accepted + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The k likeliest target tokens of each row: ids int64 [rows, k], their log_probs float32 [rows, k] (natural
    logarithm, temperature 1), and log_sum_exp float32 [rows] of all the row's logits."""

    ids: "torch.Tensor"
    log_probs: "torch.Tensor"
    log_sum_exp: "torch.Tensor"

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return self.ids.nbytes + self.log_probs.nbytes + self.log_sum_exp.nbytes

    def __len__(self) -> int:
        return len(self.ids)


Teacher: TypeAlias = "torch.Tensor | TopK"
"""What the target said: its last hidden states [rows, hidden] after the final norm, from which logits can be computed
exactly, or its likeliest tokens, where an engine shows no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """What the target said after tokens that it did not choose; as in `HiddenStates`.

    Row i read draft `accepted + i` of the request's verify step `step`: the first one is of the draft that was rejected.
    """

    step: int
    aux: "torch.Tensor"
    teacher: Teacher

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return self.aux.nbytes + self.teacher.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """Rows of the target for the positions `first_position` and on of prompt ++ output.

    aux: [rows, num_aux * hidden]; the teacher's rows are those from `first_teacher_row` on. Tensors are in the engine's
    dtype, on the CPU. `missing_rows` (offsets, ascending) do not exist; what stands in their place means nothing.
    """

    first_position: int
    aux: "torch.Tensor"
    teacher: Teacher
    first_teacher_row: int = 0
    missing_rows: tuple[int, ...] = ()
    counterfactuals: tuple[Counterfactual, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return self.aux.nbytes + self.teacher.nbytes + sum(one.num_bytes for one in self.counterfactuals)


@dataclass(frozen=True, slots=True, kw_only=True)
class UncapturedSteps:
    """Verify steps of one request of which an engine knows sums alone. They count, and no trace has them.

    proposed and accepted: steps by position in the chain.
    """

    draft_version: int
    verify_steps: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    tokens: int
    duration_s: float
    drafter: Drafter = Drafter.EAGLE3


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """The whole of an ended request."""

    request: GenerationRequest
    output_ids: tuple[int, ...]
    steps: tuple[VerifyStep, ...]
    reason: FinishReason
    time_to_first_token_s: float
    duration_s: float
    hidden: HiddenStates | None = None
    uncaptured: UncapturedSteps | None = None
    """Steps beside `steps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """What the model itself thought of one output token: log p at temperature 1 of its raw logits (natural logarithm),
    before penalties, bias, grammar and filters, as vLLM gives them. `top`: ids and log p, likeliest first."""

    token_id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens of one request; the last delta carries `finished`. `logprobs`: one a token, if the request wants them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finished: FinishedRequest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What does not change while the engine runs. Fingerprints are "sha256:..."."""

    engine: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    max_context: int
    num_slots: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    kernels: str = ""
    """Which of its C++ kernels the built-in engine uses: amx, avx512, avx2, neon; "torch" if none, "" for other engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCheckpoint:
    """A verified checkpoint folder (model.safetensors, config.json)."""

    version: int
    folder: Path
    tensors_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDraft:
    """The draft that the engine holds. `tensors_digest` is computed from the engine's own tensors; "" with version 0."""

    version: int = 0
    tensors_digest: str = ""
    draft_vocabulary_fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapResult:
    """Outcome of a swap. `pause_s` is how long the decode loop stood still for it."""

    loaded: LoadedDraft
    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy the engine is now."""

    running: int = 0
    queued: int = 0
    used_tokens: int = 0
    lookahead: int = 0
    """Drafts a step that the engine chose last."""
    cached_tokens: int = 0
    """Prompt tokens so far that were not read, since another request had read them."""


class LookaheadEstimates(Protocol):
    """What an engine that chooses its own lookahead goes by, now."""

    def survival(self, drafter: Drafter, length: int) -> float:
        """Probability that the first `length` drafts of a chain are kept; NaN while none was seen."""
        ...

    def step_seconds(self, rows: int) -> float:
        """What it costs to verify so many rows, all sequences together."""
        ...


class CaptureLoss(StrEnum):
    """Why a part of a trace is missing."""

    QUEUE = "queue"
    """The server's own queue to us was full: a message."""
    MEMORY = "memory"
    """Running requests held too many rows already: those of one step, or of one forward over a prompt."""
    UNKNOWN = "unknown_request"
    """It is of a request that has ended, or of another agent."""
    MALFORMED = "malformed"
    """A message cannot be understood."""


class Engine(Protocol):
    """Continues prompts, and swaps its draft between two decode steps."""

    @property
    def info(self) -> EngineInfo:
        """Identity and limits."""
        ...

    @property
    def loaded(self) -> LoadedDraft:
        """The draft in use."""
        ...

    @property
    def load(self) -> EngineLoad:
        """How busy it is."""
        ...

    @property
    def lookahead_estimates(self) -> LookaheadEstimates | None:
        """What lookahead is chosen by; None where the engine does not choose."""
        ...

    @property
    def faults(self) -> Mapping[int, int]:
        """Steps so far in which drafting failed, by the version that drafted: it costs drafts, never a request."""
        ...

    @property
    def capture_problem(self) -> str:
        """Why it shows nothing to learn from, one sentence; empty if it does."""
        ...

    @property
    def capture_losses(self) -> Mapping[CaptureLoss, int]:
        """What so far did not come out of it, or could not be kept; nothing else is wrong with those requests."""
        ...

    @property
    def is_alive(self) -> bool:
        """False: it has failed for good, and the process should end."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Yield tokens as they come. Closing the generator early cancels the request and frees its slot.

        It never waits for its reader: what is not read yet is kept, at most max_tokens tokens.

        Raises InvalidInput (prompt too long, absurd limits, a schema that cannot be followed, what this engine cannot do),
        Exhausted (queue full), Unavailable (stopping). Nothing of a request is silently left out.
        """
        ...

    async def swap(self, draft: DraftCheckpoint | None) -> SwapResult:
        """Serve with this draft from the next step on; None: without. Requests in flight go on.

        Raises Corrupt (not finite, digest differs) or InvalidInput (another target, another shape or vocabulary); the
        old draft then stays.
        """
        ...

    async def rehash(self) -> LoadedDraft:
        """Hash again what is held, beside the decode loop; from now on `loaded` says what was found."""
        ...


FinishedSink = Callable[[FinishedRequest], None]
"""Called on the engine's thread for every ended request: must return at once and never raise."""

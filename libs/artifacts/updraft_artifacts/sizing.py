"""How large everything must be for a target to be learned: one pure function, the source of all defaults.

The sizes of hidden states and drafts follow from the target's width, so a constant fits one model only. Every size has a
reason, and most name the setting whose default they are. `updraft size` prints them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, Protocol, Self

from updraft_artifacts.draft_shape import DraftShape, ShapeChoice

TRAINING_REQUESTS = 2_000
HELD_OUT_REQUESTS = 128
"""Replay has room for so many of mean length: as many as in the estimates of published results, four per kind of traffic."""

HELD_OUT_SHARE = 10
"""One in so many bytes of replay is for held-out requests."""

REPLAY_FILES = 1.25
"""Bytes of replay's files for each byte of stored traces, until the space of dropped ones is reclaimed."""

NUM_STATES = 3
"""Training states on the trainer's volume: two are kept while a third is written."""

NUM_DRAFTS = 3
"""Drafts on the trainer's volume: the candidate, the one that serves, and one that is being fetched."""

NUM_VERSIONS = 13
"""Versions that the registry keeps: the stable one, the one before it, a canary, and a history of ten."""

MAX_VERSION_BYTES = 16 * 2**30
"""Largest version that a registry accepts by default: more than the default drafts of the widest targets need."""

CACHED_REQUESTS = 32
"""Decoded requests in the trainer's memory: those of one estimate."""

QUEUED_REQUESTS = 8
"""Finished requests that wait in a pod: as many as run at the same time by default."""

_PASS_ROWS = 1024
"""Rows that the learner packs for one forward and backward pass on a CPU."""

_KEPT_BYTES = 180
"""Bytes that a pass keeps per row and value of the draft's hidden size, in three draft steps: counted on a draft of D 1,024."""

_DELTA_CACHE = 2**30
_VERSIONS_IN_USE = ("the stable version", "the one before it", "a canary", "an upload")
_RUNNING_TOKENS = 8 * 2048

CHUNK_BYTES, CONTEXT_SHARE, OVERLAP_SHARE = 4 * 2**20, 0.5, 0.125
"""How inference cuts long requests: bytes of a chunk, and the shares of them for rows before those that teach, at most."""

RUNNING_BYTES = 2**30
"""Memory of the agent beside a server for the rows of running requests."""

_TOP_K_BYTES = 433
"""A row has 64 token ids of about 2.6 bytes, 64 log-probabilities and a log-sum-exp of 4 bytes each."""
_TOP_K_MEMORY = 64 * (8 + 4) + 4
_LIGHT_MEMORY = 64

_LEAST_STREAM = 256 * 2**20
_LEAST_QUEUE = 64 * 2**20
_LEAST_CACHE = 256 * 2**20
_LEAST_REPLAY = 512 * 2**20
_VOLUME_STEP = 10 * 2**30


class SizedTarget(Protocol):
    """The part of a target that sizes depend on; a `TargetDescription` has it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


class SizedDraft(Protocol):
    """The part of a draft that sizes depend on; a `DraftConfig` has it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def draft_vocab_size(self) -> int: ...


class ShapedTarget(SizedTarget, Protocol):
    """A target with the default shape of its drafts."""

    @property
    def draft_shape(self) -> DraftShape: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSizes:
    """A draft of one layer."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    draft_vocab_size: int

    @classmethod
    def of(cls, target: ShapedTarget, choice: ShapeChoice | None = None) -> Self:
        """The draft for a target, with the sizes that a user chose. InvalidInput if its heads do not divide."""
        shape = (choice or ShapeChoice()).of(target.draft_shape, target.vocab_size)
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            draft_vocab_size=shape.vocab_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedTraffic:
    """How much is captured, and how. The defaults are eight requests at a time with 25 tokens per second each."""

    engine: Literal["torch", "sglang", "vllm"] = "torch"
    """torch sends the last hidden state as teacher; sglang and vllm the 64 most likely tokens."""
    encoding: Literal["fp8", "bf16"] = "fp8"
    tokens_per_second: int = 200
    answer_tokens: int = 1_000
    """Tokens of an answer, on average."""
    prompt_rows: int = 512
    """Captured tokens of a prompt, which is taken to be at least that long. Fewer fit into a chunk of a wide target."""
    minutes: int = 5
    """How long the stream holds traffic while the trainer is away, as during a restart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One number, why it is that large, and the settings for it."""

    amount: int
    unit: Literal["B", "B/s"] = "B"
    reason: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """All sizes, in the order of the data's way."""

    captured_token: Size
    captured_request: Size
    network: Size
    running: Size
    queue: Size
    stream: Size
    replay: Size
    cache: Size
    state: Size
    trainer_volume: Size
    trainer_memory: Size
    version: Size
    registry_volume: Size
    gpu_memory: Size

    def __iter__(self) -> Iterator[tuple[str, Size]]:
        """Yield names and sizes."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))


def sizing(target: SizedTarget, draft: SizedDraft, traffic: CapturedTraffic | None = None) -> Sizing:
    """Return the sizes for a target, a draft for it, and what is captured of its traffic."""
    traffic = traffic or CapturedTraffic()
    token = _captured_token(target, traffic)
    request = _captured_request(target, traffic, token)
    replay, state, version = _replay(request), _state(target, draft), _version(target, draft)
    cache = _cache(target, traffic)
    return Sizing(
        captured_token=token,
        captured_request=request,
        network=Size(
            amount=_bytes_per_second(target, traffic, request),
            unit="B/s",
            reason=f"{traffic.tokens_per_second:,} captured tokens per second, from pods to Redis and on to the trainer",
        ),
        running=_running(),
        queue=_queue(target, traffic),
        stream=_stream(_bytes_per_second(target, traffic, request), traffic),
        replay=replay,
        cache=cache,
        state=state,
        trainer_volume=_trainer_volume(replay, state, version),
        trainer_memory=_trainer_memory(target, draft, state, version, cache),
        version=version,
        registry_volume=_registry_volume(version),
        gpu_memory=_gpu_memory(draft, version),
    )


def num_parameters(target: SizedTarget, draft: SizedDraft) -> tuple[int, int]:
    """Return the numbers of trained weights (layer, projection of three states, norms) and of frozen ones (the head)."""
    hidden = draft.hidden_size
    attention = hidden * draft.head_dim * (2 * (draft.num_heads + 2 * draft.num_kv_heads) + draft.num_heads)
    projection = 3 * target.hidden_size * hidden
    return attention + projection + 3 * hidden * draft.intermediate_size + 4 * hidden, hidden * draft.draft_vocab_size


def kept_requests(replay_bytes: int, request_bytes: int) -> tuple[int, int]:
    """Return how many requests to train on, and how many held-out ones, replay has room for."""
    held_out_bytes = replay_bytes // HELD_OUT_SHARE
    return (replay_bytes - held_out_bytes) // request_bytes, held_out_bytes // request_bytes


def replay_for(num_held_out: int, request_bytes: int) -> int:
    """Return the bytes of replay that have room for so many held-out requests."""
    return HELD_OUT_SHARE * num_held_out * request_bytes


def reserved(state: Size, version: Size) -> int:
    """Return the bytes of the trainer's volume that are not for replay."""
    return NUM_STATES * state.amount + NUM_DRAFTS * version.amount


def registry_needs(volume_bytes: int, version_bytes: int) -> tuple[int, str]:
    """Return the bytes that the registry needs for the versions in use, and a clause if its volume has fewer.

    `volume_bytes` is 0 for a bucket, which has no size.
    """
    needed = len(_VERSIONS_IN_USE) * version_bytes
    if not 0 < volume_bytes < needed:
        return needed, ""
    return needed, (
        f"the registry's volume has {readable(volume_bytes)}, but {', '.join(_VERSIONS_IN_USE)} of"
        f" {readable(version_bytes)} each need {readable(needed)}"
    )


def registry_limit(limit: int, version_bytes: int) -> str:
    """A clause with the setting if a registry that accepts `limit` bytes (0: not known) refuses a version; empty if not."""
    if not 0 < limit < version_bytes:
        return ""
    return (
        f"a version has {readable(version_bytes)}, but the registry accepts at most {readable(limit)}: set"
        f" UPDRAFT_REGISTRY_MAX_DRAFT_BYTES to at least {version_bytes}"
    )


def redis_memory(stream_bytes: int) -> int:
    """Return the `maxmemory` of a Redis for streams of this size alone: half as much again for what Redis adds, for dead
    letters and for a limit that it only keeps approximately."""
    return math.ceil(1.5 * stream_bytes / 2**20) * 2**20


def redis_process_memory(max_memory: int) -> int:
    """Return the memory limit of its process, which copies pages while it rewrites its log."""
    return 2 * max_memory


def redis_too_small(max_memory: int, stream_bytes: int) -> str:
    """One sentence if Redis may use less than the streams may; empty if not, or if it has no limit (0).

    A Redis that is full rejects new traces, whereas a full stream drops its oldest.
    """
    if not 0 < max_memory < stream_bytes:
        return ""
    return (
        f"Redis has {readable(max_memory)} for streams of {readable(stream_bytes)}: raise its maxmemory, or lower"
        " UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES of the pods"
    )


def quantity(num_bytes: int) -> str:
    """Return a volume's size as Kubernetes writes it, in steps of 10 GiB."""
    return f"{10 * math.ceil(num_bytes / _VOLUME_STEP)}Gi"


def readable(num_bytes: float) -> str:
    """Return bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            digits = 0 if num_bytes >= 100 * scale else 1 if num_bytes >= 10 * scale else 2
            return f"{num_bytes / scale:.{digits}f} {unit}"
    return f"{num_bytes:.0f} B"


def _captured_token(target: SizedTarget, traffic: CapturedTraffic) -> Size:
    states = _state_bytes(target, traffic, 3)
    what = f"three states of {target.hidden_size:,} values in {traffic.encoding}"
    if traffic.engine == "torch":
        return Size(
            amount=states + _state_bytes(target, traffic, 1), reason=f"{what}, and the last one, which is the teacher"
        )
    return Size(amount=states + _TOP_K_BYTES, reason=f"{what}, and the 64 most likely tokens, which are the teacher")


def _state_bytes(target: SizedTarget, traffic: CapturedTraffic, num_states: int) -> int:
    value, scale = (1, 4) if traffic.encoding == "fp8" else (2, 0)
    return num_states * target.hidden_size * value + scale


def _captured_request(target: SizedTarget, traffic: CapturedTraffic, token: Size) -> Size:
    """In a request that has to be cut, rows of the prompt and rows that a chunk repeats have no teacher."""
    answer, states = traffic.answer_tokens, _state_bytes(target, traffic, 3)
    context = traffic.prompt_rows
    if token.amount * (answer + context) <= CHUNK_BYTES:
        reason = f"an answer of {answer:,} tokens and the last {context:,} of its prompt"
        return Size(amount=token.amount * (answer + context), reason=reason)
    context, overlap = _num_context(target, traffic), min(traffic.prompt_rows, _fitting(OVERLAP_SHARE, states))
    first, later = (max(1, (CHUNK_BYTES - states * count) // token.amount) for count in (context, overlap))
    num_later = max(0, math.ceil((answer - first) / later))
    repeated = num_later * overlap
    return Size(
        amount=token.amount * answer + states * (context + repeated),
        reason=(
            f"an answer of {answer:,} tokens, the last {context:,} of its prompt, and {repeated:,} that are in two of its"
            f" {num_later + 1:,} chunks"
        ),
    )


def _num_context(target: SizedTarget, traffic: CapturedTraffic) -> int:
    return min(traffic.prompt_rows, _fitting(CONTEXT_SHARE, _state_bytes(target, traffic, 3)))


def _fitting(share: float, state_bytes: int) -> int:
    """How many rows without a teacher fit into a share of a chunk."""
    return int(share * CHUNK_BYTES / state_bytes)


def _num_rows(target: SizedTarget, traffic: CapturedTraffic) -> int:
    """How many rows of a request an engine captures."""
    return traffic.answer_tokens + _num_context(target, traffic)


def _token_memory(target: SizedTarget, traffic: CapturedTraffic) -> int:
    """The torch engine keeps states in bfloat16, the agent beside a server as they are sent."""
    states = 6 * target.hidden_size if traffic.engine == "torch" else _state_bytes(target, traffic, 3)
    return states + _teacher_memory(target, traffic) + _LIGHT_MEMORY


def _teacher_memory(target: SizedTarget, traffic: CapturedTraffic) -> int:
    return 2 * target.hidden_size if traffic.engine == "torch" else _TOP_K_MEMORY


def _running() -> Size:
    return Size(
        amount=RUNNING_BYTES,
        reason="rows of running requests in the agent beside a server; further rows are lost and counted",
        settings=("UPDRAFT_INFERENCE_CAPTURE_RUNNING_BYTES",),
    )


def _queue(target: SizedTarget, traffic: CapturedTraffic) -> Size:
    request = _token_memory(target, traffic) * _num_rows(target, traffic)
    return Size(
        amount=max(_LEAST_QUEUE, QUEUED_REQUESTS * request),
        reason=f"{QUEUED_REQUESTS} finished requests of {readable(request)} that wait in a pod to be encoded and sent",
        settings=("UPDRAFT_INFERENCE_CAPTURE_QUEUE_BYTES",),
    )


def _bytes_per_second(target: SizedTarget, traffic: CapturedTraffic, request: Size) -> int:
    """Bytes per second on the wire: captured rows, the rows that chunks repeat, and prompt rows without a teacher."""
    return math.ceil(traffic.tokens_per_second * request.amount / _num_rows(target, traffic))


def _stream(bytes_per_second: int, traffic: CapturedTraffic) -> Size:
    return Size(
        amount=max(_LEAST_STREAM, bytes_per_second * 60 * traffic.minutes),
        reason=f"memory of Redis for {traffic.minutes} minutes of {traffic.tokens_per_second:,} captured tokens per second",
        settings=("spec.traces.maxSize", "UPDRAFT_INFERENCE_CAPTURE_MAX_BYTES"),
    )


def _replay(request: Size) -> Size:
    num_requests = max(
        math.ceil(TRAINING_REQUESTS * HELD_OUT_SHARE / (HELD_OUT_SHARE - 1)), HELD_OUT_REQUESTS * HELD_OUT_SHARE
    )
    return Size(
        amount=max(_LEAST_REPLAY, num_requests * request.amount),
        reason=f"{TRAINING_REQUESTS:,} requests to train on and {HELD_OUT_REQUESTS} held-out ones, which have a tenth of it",
        settings=("UPDRAFT_TRAINER_REPLAY_MAX_BYTES",),
    )


def _cache(target: SizedTarget, traffic: CapturedTraffic) -> Size:
    """A sample holds its states as they were sent, and its decoded teacher."""
    row = _state_bytes(target, traffic, 3) + _teacher_memory(target, traffic)
    request = row * _num_rows(target, traffic)
    return Size(
        amount=max(_LEAST_CACHE, CACHED_REQUESTS * request),
        reason=f"the {CACHED_REQUESTS} held-out requests of an estimate, with {readable(request)} in memory each",
        settings=("UPDRAFT_TRAINER_CACHE_MAX_BYTES",),
    )


def _state(target: SizedTarget, draft: SizedDraft) -> Size:
    trained, frozen = num_parameters(target, draft)
    return Size(
        amount=16 * trained + 2 * frozen,
        reason=f"{trained / 1e6:,.0f} M trained weights, their average and two moments in float32, and the head in bfloat16",
    )


def _version(target: SizedTarget, draft: SizedDraft) -> Size:
    total = sum(num_parameters(target, draft))
    amount = 2 * total + 8 * draft.draft_vocab_size + target.vocab_size
    reason = f"{total / 1e6:,.0f} M weights in bfloat16, and the map of its {draft.draft_vocab_size:,} tokens"
    if amount > MAX_VERSION_BYTES:
        reason += f"; a registry accepts {readable(MAX_VERSION_BYTES)} by default, so raise its limit"
    return Size(amount=amount, reason=reason, settings=("UPDRAFT_REGISTRY_MAX_DRAFT_BYTES",))


def _trainer_volume(replay: Size, state: Size, version: Size) -> Size:
    return Size(
        amount=math.ceil(1.1 * (REPLAY_FILES * replay.amount + reserved(state, version))),
        reason=f"files of replay, {NUM_STATES} training states, {NUM_DRAFTS} drafts, and a tenth for the file system",
        settings=("spec.trainer.storage.size",),
    )


def _trainer_memory(target: SizedTarget, draft: SizedDraft, state: Size, version: Size, cache: Size) -> Size:
    trained, frozen = num_parameters(target, draft)
    head = 4 * target.hidden_size * target.vocab_size
    kept = _KEPT_BYTES * _PASS_ROWS * draft.hidden_size
    return Size(
        amount=26 * trained + 6 * frozen + head + kept + state.amount + 2 * version.amount + cache.amount,
        reason=(
            "about: weights, gradients, moments and averages in float32, weights in bfloat16, the state that is being saved,"
            f" two copies of a file of it, the target's embedding and head, a pass of {_PASS_ROWS:,} rows, the candidate and"
            " the serving draft, and cached requests"
        ),
        settings=("spec.trainer.resources",),
    )


def _registry_volume(version: Size) -> Size:
    return Size(
        amount=(NUM_VERSIONS + 1) * version.amount + _DELTA_CACHE,
        reason=f"{NUM_VERSIONS} kept versions, one that is being uploaded, and 1 GiB of deltas",
        settings=("spec.registry.storage.size",),
    )


def _gpu_memory(draft: SizedDraft, version: Size) -> Size:
    cache = 4 * draft.num_kv_heads * draft.head_dim * _RUNNING_TOKENS
    return Size(
        amount=version.amount + cache,
        reason=f"in addition to the target's: the draft, and its keys and values of {_RUNNING_TOKENS:,} tokens",
    )


_USUAL_SHAPE = DraftShape(num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=12_288, vocab_size=32_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsualTarget:
    """Sizes of an 8B target, Qwen3-8B: for defaults of those who cannot read the target."""

    hidden_size: int = 4096
    vocab_size: int = 151_936
    draft_shape: DraftShape = _USUAL_SHAPE


def usual(traffic: CapturedTraffic | None = None) -> Sizing:
    """Return the sizes for an 8B target."""
    target = UsualTarget()
    return sizing(target, DraftSizes.of(target), traffic)

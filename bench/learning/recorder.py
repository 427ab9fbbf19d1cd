"""Records the target's real answers once, as traces with the hidden states that serving captures by default.

Three of four requests are greedy, the fourth is sampled; the first of sixteen may have a long answer. Files hold `CHUNK`
requests, appear whole, and are not made again, so an interrupted recording goes on where it stopped.
"""

import asyncio
import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.learning.kinds import requests
from rich.progress import Progress

from updraft.trace.v1 import trace_pb2
from updraft_draft.target_weights import TargetHead
from updraft_inference.agent.direct import answered, recorded
from updraft_inference.engine import CaptureParams, Drafter, GenerationRequest, SamplingParams
from updraft_inference.text.chat_template import ChatTemplate
from updraft_inference.text.tokenization import Tokenizer
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits
from updraft_trainer.data.sample import ExpectedTarget, Sample, read_sample

NUM_TRAINING = 400
NUM_HELD_OUT = 48
"""Requests of each kind."""
CHUNK = 16
STREAMS = 16
MAX_PROMPT_TOKENS = 256
PROMPT_ROWS = 64
TOKENS, LONG_TOKENS = 128, 512
LONG_EVERY = 16
SAMPLED_EVERY = 4
TEMPERATURE = 0.8


class Recorder:
    """Recorded answers of one target in a folder of the cache."""

    def __init__(self, model: Path, folder: Path, target: TargetHead) -> None:
        self._model = model
        self._folder = folder
        self._target = target

    def record(self, kinds: Sequence[str], num_training: int, num_held_out: int) -> None:
        """Make the files that are missing, and show the progress."""
        missing = [
            (path, texts)
            for kind in kinds
            for held_out, number in ((False, num_training), (True, num_held_out))
            for path, texts in self._chunks(kind, number, held_out=held_out)
            if not path.exists()
        ]
        if missing:
            asyncio.run(self._serve(missing))

    def samples(self, kind: str, number: int, *, held_out: bool) -> list[Sample]:
        """Recorded requests of a kind, in the order of recording."""
        paths = [path for path, _ in self._chunks(kind, number, held_out=held_out)]
        return [sample for path in paths for sample in _read(path, self._target, kind)][:number]

    def texts(self, kind: str, number: int, *, held_out: bool) -> list[list[int]]:
        """Tokens of prompt and answer of the same requests."""
        paths = [path for path, _ in self._chunks(kind, number, held_out=held_out)]
        texts = [[*trace.prompt_ids, *trace.output_ids] for path in paths for trace in _traces(path)]
        return texts[:number]

    def digest(self, kind: str, number: int, *, held_out: bool) -> bytes:
        """Identifies these recordings."""
        paths = [path for path, _ in self._chunks(kind, number, held_out=held_out)]
        found = hashlib.sha256(str(number).encode())
        for path in paths:
            found.update(path.read_bytes())
        return found.digest()

    def _chunks(self, kind: str, number: int, *, held_out: bool) -> Iterator[tuple[Path, list[str]]]:
        whole = -(-number // CHUNK) * CHUNK
        texts = requests(kind, whole, held_out=held_out)
        name = "held-out" if held_out else "training"
        for n in range(0, whole, CHUNK):
            yield self._folder / kind / f"{name}-{n:04}.traces", texts[n : n + CHUNK]

    async def _serve(self, missing: Sequence[tuple[Path, list[str]]]) -> None:
        """Keep `STREAMS` requests running; write each file when its requests are answered."""
        tokenizer, template = Tokenizer.open(self._model), ChatTemplate.open(self._model)
        assert template is not None, "the demo's model has a chat template"
        slots = asyncio.Semaphore(STREAMS)
        limits = Limits(num_slots=STREAMS, max_context=MAX_PROMPT_TOKENS + LONG_TOKENS, max_lookahead=3)
        with Progress() as progress:
            bar = progress.add_task("recording answers", total=sum(len(texts) for _, texts in missing))
            async with TorchEngine.open(self._model, EngineOptions(limits=limits), lambda _: None) as engine:

                async def answer(request: GenerationRequest) -> trace_pb2.Trace:
                    async with slots:
                        finished = await answered(engine, request)
                    progress.advance(bar)
                    return recorded(engine, finished, recorder="bench")

                async def record(path: Path, texts: Sequence[str]) -> None:
                    prompts = [
                        tokenizer.encode(template.render([{"role": "user", "content": text}]), add_special_tokens=False)
                        for text in texts
                    ]
                    requests = [_request(path, n, prompt[-MAX_PROMPT_TOKENS:]) for n, prompt in enumerate(prompts)]
                    _write(path, await asyncio.gather(*map(answer, requests)))

                async with asyncio.TaskGroup() as tasks:
                    for path, texts in missing:
                        tasks.create_task(record(path, texts))


def _request(path: Path, n: int, prompt: tuple[int, ...]) -> GenerationRequest:
    is_sampled = n % SAMPLED_EVERY == SAMPLED_EVERY - 1
    return GenerationRequest(
        request_id=f"{path.parent.name}/{path.stem}/{n:02}",
        prompt_ids=prompt,
        max_tokens=LONG_TOKENS if n % LONG_EVERY == 0 else TOKENS,
        sampling=SamplingParams(temperature=TEMPERATURE if is_sampled else 0.0, seed=n),
        drafter=Drafter.NGRAM,
        capture=CaptureParams(payload=True, prompt_rows=PROMPT_ROWS),
    )


def _write(path: Path, traces: Sequence[trace_pb2.Trace]) -> None:
    """One file, whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for data in (one.SerializeToString() for one in traces):
            file.write(struct.pack("<I", len(data)) + data)
    part.rename(path)


def _read(path: Path, target: TargetHead, kind: str) -> Iterator[Sample]:
    for message in _traces(path):
        message.header.domain = kind
        expected = ExpectedTarget(
            target_fingerprint=message.header.target_fingerprint,
            tokenizer_fingerprint=message.header.tokenizer_fingerprint,
            aux_size=len(target.config.aux_layers) * target.config.hidden_size,
            hidden_size=target.config.hidden_size,
            vocab_size=target.config.vocab_size,
        )
        yield read_sample(message.SerializeToString(), expected)


def _traces(path: Path) -> Iterator[trace_pb2.Trace]:
    data = memoryview(path.read_bytes())
    while data:
        (size,) = struct.unpack_from("<I", data)
        yield trace_pb2.Trace.FromString(bytes(data[4 : 4 + size]))
        data = data[4 + size :]

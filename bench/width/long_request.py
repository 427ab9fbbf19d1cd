"""One long request at the width of a large target, from the messages of SGLang's plugin to the trainer's samples.

    python -m bench.width.long_request [--width 7168] [--tokens 32768] [--tokens-per-second 2000]

Everything behind the plugin is real: the agent's assembler, trace builder, chunks and encoding, and the reader of the trainer.
In place of Redis each entry is read at once and thrown away. The memory is the process's, with torch and the reader.
"""

import argparse
import asyncio
import json
import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from bench.width.replay import TOP_K, VOCAB, expected_target
from prometheus_client import CollectorRegistry
from tests.support.tap_plugin import SAMPLING

from updraft.trace.v1 import trace_pb2
from updraft_artifacts.sizing import RUNNING_BYTES
from updraft_chassis.clock import SystemClock
from updraft_draft import tensors
from updraft_inference.agent.capture import Capture, Sink
from updraft_inference.agent.selection import CaptureRates
from updraft_inference.agent.trace import Origin
from updraft_inference.metrics import Metrics
from updraft_inference.process import limit_memory
from updraft_inference.sidecar.assembly import Assembler
from updraft_trainer.data.sample import read_sample

NUM_PROMPT = 2_000
STEP_TOKENS = 3
TICK_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class LongRequest:
    width: int
    tokens: int
    taught_tokens: int
    chunks: int
    largest_chunk_mib: float
    sent_mb: float
    max_rss_mb: float
    rss_before_mb: float


class Reader:
    """In place of Redis: reads each entry as the trainer does."""

    def __init__(self, width: int) -> None:
        self._expected = expected_target(width)
        self._known = torch.ones(VOCAB, dtype=torch.bool)
        self.sizes: list[int] = []
        self.num_taught = 0

    async def append(self, trace_id: bytes, entry: bytes) -> int:
        sample = await asyncio.to_thread(read_sample, entry, self._expected)
        self.sizes.append(len(entry))
        self.num_taught += len(sample.trainable(self._known)[0])
        return 0


def message(width: int, num_rows: int, *, num_taught: int) -> dict[str, torch.Tensor]:
    """Tensors of a message of the plugin."""
    first = torch.randint(VOCAB - TOP_K, (num_taught, 1))
    return {
        "aux": torch.randn(num_rows, 3 * width).bfloat16(),
        "ids": (first + torch.arange(TOP_K)).int(),
        "log_probs": torch.randn(num_taught, TOP_K).log_softmax(-1) - 0.1,
        "log_sum_exp": torch.zeros(num_taught),
    }


def steps(rid: str, width: int, num_tokens: int) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Verify steps of three tokens each, after the first token."""
    rows = message(width, STEP_TOKENS, num_taught=STEP_TOKENS)
    for start in range(1, num_tokens, STEP_TOKENS):
        request = {
            "rid": rid,
            "probability": 1.0,
            "version": 1,
            "position": NUM_PROMPT + start - 1,
            "accepted": STEP_TOKENS - 1,
            "drafts": [1] * STEP_TOKENS,
            "log_p": [-1.0] * STEP_TOKENS,
            "rows": STEP_TOKENS,
            "counterfactual_rows": 0,
        }
        header = {"kind": "steps", "batch_size": 1, "duration_us": 1000}
        yield header | {"requests": [request]}, rows


def end(rid: str, num_tokens: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The end of the request, which brings its tokens."""
    num_steps = len(range(1, num_tokens, STEP_TOKENS))
    by_position = [num_steps] * STEP_TOKENS
    sums = {"version": 1, "steps": num_steps, "proposed_by_position": by_position, "accepted": by_position, "us": 1000}
    header = {"kind": "finished", "rid": rid, "finish": "length_capped", "probability": 1.0, "duration_us": 1000}
    header |= {"prompt_tokens": NUM_PROMPT, "output_tokens": num_tokens, "counters": [sums], "sampling": SAMPLING}
    return header, {"tokens": torch.full((NUM_PROMPT + num_tokens,), 7, dtype=torch.int32)}


async def measure(width: int, num_tokens: int, tokens_per_second: float) -> LongRequest:
    before_mb = rss_mb()
    reader, metrics = Reader(width), Metrics(CollectorRegistry())
    expected = expected_target(width)
    origin = Origin(
        speculator="default",
        pod="p",
        engine="sglang",
        target_fingerprint=expected.target_fingerprint,
        tokenizer_fingerprint=expected.tokenizer_fingerprint,
    )
    encode = partial(tensors.encode, encoding=trace_pb2.TENSOR_ENCODING_FP8_E4M3)
    rates, sink = CaptureRates(evaluation_fraction=0), Sink(stream=reader, origin=origin, encode=encode)
    capture = Capture(rates, sink, max_entries=64, max_bytes=256 << 20, metrics=metrics, clock=SystemClock())
    assembler = Assembler(max_bytes=RUNNING_BYTES, pack=tensors.packed)
    prompt_rows = min(NUM_PROMPT, rates.prompt_rows)
    position = NUM_PROMPT - prompt_rows
    part = {"rid": "a", "probability": 1.0, "position": position, "rows": prompt_rows, "teacher_rows": 1}
    prefill = {"kind": "prefill", "requests": [part]}, message(width, prompt_rows, num_taught=1)
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(capture.run())
        for number, (header, rows) in enumerate((prefill, *steps("a", width, num_tokens), end("a", num_tokens))):
            for ended in assembler.take(header, rows, 0.0):
                assert ended.finished is not None
                capture.offer(ended.finished, capture.plan_of_chosen(ended.trace_id, ended.terms, 1.0))
            if number % (TICK_TOKENS // STEP_TOKENS) == 0:
                await asyncio.sleep(TICK_TOKENS / tokens_per_second)
        await capture.flush(60)
        sending.cancel()
    if assembler.losses:
        raise SystemExit(f"lost: {dict(assembler.losses)}")
    if capture.counters.dropped:
        raise SystemExit(f"dropped: {dict(capture.counters.dropped)}")
    return LongRequest(
        width=width,
        tokens=num_tokens,
        taught_tokens=reader.num_taught,
        chunks=len(reader.sizes),
        largest_chunk_mib=max(reader.sizes) / 2**20,
        sent_mb=sum(reader.sizes) / 1e6,
        max_rss_mb=rss_mb(),
        rss_before_mb=before_mb,
    )


def rss_mb() -> float:
    """The most that this process had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=7168)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--tokens-per-second", type=float, default=2000)
    args = parser.parse_args()
    limit_memory("sglang")
    torch.set_num_threads(1)
    found = asyncio.run(measure(args.width, args.tokens, args.tokens_per_second))
    print(json.dumps({name: round(value, 2) for name, value in asdict(found).items()}, indent=1))


if __name__ == "__main__":
    main()

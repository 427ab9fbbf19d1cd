"""Replay at the width of a real target: traces stored and samples read, in bytes of traces per second.

    python -m bench.width.replay [--width 4096] [--seconds 20] [--folder /on/the/disk/to/measure]

One thread admits synthetic traces all the time, as intake does with a full stream; another one reads batches as training does,
without a cache, and decodes them into one tensor. Both share the machine, and the files are those of the trainer.
"""

import argparse
import json
import random
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from updraft.trace.v1 import trace_pb2
from updraft_draft import trace_bytes
from updraft_draft.tensors import decoded, encode
from updraft_trainer.data.replay import IncomingTrace, Replay
from updraft_trainer.data.retention import Pool, ReplayLimits
from updraft_trainer.data.sample import SCHEMA, ExpectedTarget, read_sample

VOCAB = 151_936
TOP_K = 64
PROMPT_ROWS = 64
BATCH = 8
"""Traces per admission, as in intake."""


@dataclass(frozen=True, kw_only=True)
class ReplaySpeed:
    """Bytes are those of traces: read, and read and decoded. `_cpu_s`: of a second of processor time, whatever else the
    machine does. `longest_read_ms`: of one batch of four samples."""

    width: int
    rows_per_trace: int
    bytes_per_row: float
    alone_mb_s: float
    alone_mb_cpu_s: float
    alone_decoded_mb_cpu_s: float
    read_mb_s: float
    decoded_mb_s: float
    stored_mb_s: float
    longest_read_ms: float
    files_over_live: float
    max_rss_mb: float


def expected_target(width: int) -> ExpectedTarget:
    return ExpectedTarget(
        target_fingerprint="sha256:t",
        tokenizer_fingerprint="sha256:k",
        aux_size=3 * width,
        hidden_size=width,
        vocab_size=VOCAB,
    )


def synthetic(width: int, num_rows: int) -> trace_pb2.Trace:
    """A request with random states, as a pod with SGLang sends it: float8 rows, a top-k teacher for the output."""
    generator = torch.Generator().manual_seed(0)
    num_output = num_rows - PROMPT_ROWS + 1
    trace = trace_pb2.Trace(
        header=trace_pb2.Header(
            schema=SCHEMA,
            target_fingerprint="sha256:t",
            tokenizer_fingerprint="sha256:k",
            policy=trace_pb2.Policy(train=True, retain=True),
            payload_probability=1.0,
            last_chunk=True,
        ),
        prompt_ids=torch.randint(VOCAB, (PROMPT_ROWS,), generator=generator).tolist(),
        output_ids=torch.randint(VOCAB, (num_output,), generator=generator).tolist(),
    )
    rows = torch.randn(num_rows, 3 * width, generator=generator)
    trace.payload.aux_hidden.CopyFrom(encode(rows, trace_pb2.TENSOR_ENCODING_FP8_E4M3))
    trace.payload.first_teacher_row = PROMPT_ROWS - 1
    scores = torch.randn(num_output, TOP_K, generator=generator).log_softmax(-1) - 0.1
    first = torch.randint(VOCAB - TOP_K, (num_output, 1), generator=generator)
    trace.payload.top_k.k = TOP_K
    trace.payload.top_k.ids.extend((first + torch.arange(TOP_K)).flatten().tolist())
    trace.payload.top_k.log_probs.extend(scores.flatten().tolist())
    trace.payload.top_k.log_sum_exp.extend([1.0] * num_output)
    return trace


def incoming(trace: trace_pb2.Trace, expected: ExpectedTarget) -> Iterator[IncomingTrace]:
    """The same request again and again, each time with an id of its own, as pods write it. Takes the rows out of `trace`."""
    aux = trace.payload.aux_hidden.data
    trace.payload.aux_hidden.ClearField("data")
    for number in range(1_000_000):
        trace.header.trace_id = number.to_bytes(16, "big")
        data = trace_bytes.serialize(trace, aux)
        yield IncomingTrace(sample=read_sample(data, expected), data=data)


@dataclass(slots=True)
class Reads:
    """Megabytes of traces that were read, and the seconds for it."""

    megabytes: float = 0.0
    read_s: float = 0.0
    read_cpu_s: float = 0.0
    decode_s: float = 0.0
    decode_cpu_s: float = 0.0
    longest_s: float = 0.0


def read_for(replay: Replay, size: int, seconds: float) -> Reads:
    """Read batches of traces of `size` bytes, and decode each into one tensor."""
    rng, start_s, reads = random.Random(0), time.monotonic(), Reads()
    while (now_s := time.monotonic()) - start_s < seconds:
        began_cpu_s = time.thread_time()
        samples = replay.training_batch({}, max_uses=1, rng=rng)
        read_s, read_cpu_s = time.monotonic() - now_s, time.thread_time()
        decoded([sample.aux for sample in samples])
        reads.decode_s += time.monotonic() - now_s - read_s
        reads.decode_cpu_s += time.thread_time() - read_cpu_s
        reads.read_s += read_s
        reads.read_cpu_s += read_cpu_s - began_cpu_s
        reads.longest_s = max(reads.longest_s, read_s)
        reads.megabytes += len(samples) * size / 1e6
    return reads


def live_bytes(replay: Replay) -> int:
    return sum(replay.num_bytes(pool) for pool in Pool)


def measure(folder: Path, *, width: int, num_rows: int, seconds: float, max_bytes: int) -> ReplaySpeed:
    expected, stop, num_stored = expected_target(width), threading.Event(), 0
    with Replay.open(folder, limits=ReplayLimits.of(max_bytes), expected=expected, cache_bytes=0) as replay:
        traces = incoming(synthetic(width, num_rows), expected)
        size = len(next(traces).data)

        def admit_batch() -> int:
            return len(replay.admit([next(traces) for _ in range(BATCH)]))

        def admit() -> None:
            nonlocal num_stored
            while not stop.is_set():
                num_stored += admit_batch()

        while live_bytes(replay) < max_bytes // 4:
            admit_batch()
        alone = read_for(replay, size, seconds)
        intake = threading.Thread(target=admit)
        intake.start()
        beside = read_for(replay, size, seconds)
        stop.set()
        intake.join()
        files_over_live = replay.num_file_bytes / live_bytes(replay)
    return ReplaySpeed(
        width=width,
        rows_per_trace=num_rows,
        bytes_per_row=size / num_rows,
        alone_mb_s=alone.megabytes / alone.read_s,
        alone_mb_cpu_s=alone.megabytes / alone.read_cpu_s,
        alone_decoded_mb_cpu_s=alone.megabytes / (alone.read_cpu_s + alone.decode_cpu_s),
        read_mb_s=beside.megabytes / beside.read_s,
        decoded_mb_s=beside.megabytes / (beside.read_s + beside.decode_s),
        stored_mb_s=num_stored * size / 1e6 / seconds,
        longest_read_ms=1000 * beside.longest_s,
        files_over_live=files_over_live,
        max_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--max-bytes", type=int, default=2 * 1024**3)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(
            Path(folder) / "replay",
            width=args.width,
            num_rows=args.rows,
            seconds=args.seconds,
            max_bytes=args.max_bytes,
        )
    print(json.dumps({name: round(value, 2) for name, value in asdict(found).items()}, indent=1))


if __name__ == "__main__":
    main()

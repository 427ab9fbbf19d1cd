"""The time of a decode step by span, and by operation with its shapes: `python -m bench.serving.profile`.

The scheduler runs on this thread, without HTTP and without the engine's inbox. Steps are timed without the profiler, which
makes small operations look expensive; the profiler then shows the share of each operation.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch
from bench import harness
from bench.serving.inline import Inline
from bench.serving.plan import LOOKAHEAD, SEED
from bench.serving.workloads import Words, prompts
from rich.console import Console
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from updraft_cli import output
from updraft_inference.engine import Drafter

WARM_UP_STEPS = 8
NUM_ROWS = 28
_NO_OPERATION = "(no operation of torch: Python, and the C++ kernels)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Time per step of all calls of an operation with the same input shapes, without the operations it calls."""

    name: str
    shapes: str
    calls: float
    ms: float


@dataclass(slots=True, kw_only=True)
class Profile:
    """The profile of steps with one batch size."""

    batch: int
    step_ms: list[float] = field(default_factory=list)
    """Milliseconds of each step without the profiler."""
    forward_ms: list[float] = field(default_factory=list)
    logits_ms: list[float] = field(default_factory=list)
    tokens_per_step: float = 0.0
    profiled_step_ms: float = 0.0
    operations: list[Operation] = field(default_factory=list)


def operations(events: SequenceOf[Any], *, steps: int, step_ms: float) -> list[Operation]:
    """Operations of a profiler's averages by falling cost, and the rest of the profiled step.

    Matrix products are distinguished by their shapes. Other shapes change with the length of the context.
    """
    calls: Counter[tuple[str, str]] = Counter()
    ms: Counter[tuple[str, str]] = Counter()
    for event in events:
        key = (event.key, _shapes(event) if _is_product(event.key) else "")
        calls[key] += event.count / steps
        ms[key] += event.self_cpu_time_total / 1e3 / steps
    rows = [Operation(name=key[0], shapes=key[1], calls=calls[key], ms=ms[key]) for key in calls]
    rows.append(Operation(name=_NO_OPERATION, shapes="", calls=0, ms=step_ms - sum(one.ms for one in rows)))
    return sorted(rows, key=lambda one: -one.ms)


def _is_product(name: str) -> bool:
    return name.endswith("mm") or "linear" in name


def _shapes(event: Any) -> str:
    return " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)


def measure(inline: Inline, requests: SequenceOf[tuple[int, ...]], *, steps: int, drafter: Drafter) -> Profile:
    """Decode all prompts together, for `steps` without the profiler and as many with it."""
    result = Profile(batch=len(requests))
    inline.start(requests, max_tokens=inline.limits.max_context - max(map(len, requests)), drafter=drafter)
    for _ in range(WARM_UP_STEPS):
        inline.step()
    tokens = inline.num_tokens
    for _ in range(steps):
        spent = inline.step()
        result.step_ms.append(1e3 * spent.step_s)
        result.forward_ms.append(1e3 * spent.forward_s)
        result.logits_ms.append(1e3 * spent.logits_s)
    result.tokens_per_step = (inline.num_tokens - tokens) / steps
    with torch_profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            inline.step()
        result.profiled_step_ms = 1e3 * (time.perf_counter() - started) / steps
    averages = profiler.key_averages(group_by_input_shape=True)
    result.operations = operations(averages, steps=steps, step_ms=result.profiled_step_ms)
    inline.stop()
    return result


def show(console: Console, result: Profile) -> None:
    """The spans of a step, then its operations."""
    middle = sorted(range(len(result.step_ms)), key=result.step_ms.__getitem__)[len(result.step_ms) // 2]
    step, forward, logits = result.step_ms[middle], result.forward_ms[middle], result.logits_ms[middle]
    console.print(
        f"\nbatch {result.batch}: a step takes {step:.2f} ms (median of {len(result.step_ms)}; fastest"
        f" {min(result.step_ms):.2f}), {result.profiled_step_ms:.2f} ms under the profiler;"
        f" {result.tokens_per_step:.2f} tokens per step"
    )
    spans = output.table("span of the median step", ">ms", ">share")
    for name, ms in (("forward", forward), ("logits", logits), ("all else", step - forward - logits)):
        spans.add_row(name, f"{ms:.2f}", f"{100 * ms / step:.1f} %")
    console.print(spans)
    table = output.table("operation", ">calls/step", ">ms/step", ">share", "shapes")
    for one in result.operations[:NUM_ROWS]:
        table.add_row(
            one.name, f"{one.calls:.0f}", f"{one.ms:.3f}", f"{100 * one.ms / result.profiled_step_ms:.1f} %", one.shapes
        )
    console.print(table)


def main() -> None:
    """Profile each batch size and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--domain", default="code")
    parser.add_argument("--no-kernels", action="store_true", help="use torch's operations, not the C++ kernels")
    parser.add_argument("--drafter", type=Drafter, choices=[Drafter.NONE, Drafter.NGRAM], default=Drafter.NONE)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = harness.model()
    words = Words.open(model)
    console = output.console()
    for batch in arguments.batch:
        requests = prompts(words, arguments.domain, batch, seed=SEED, is_held_out=True)
        longest = max(map(len, requests))
        tokens_per_step = 1 if arguments.drafter is Drafter.NONE else LOOKAHEAD + 1
        # The first requests decode while the others are prefilled, for a few steps each.
        context = longest + (8 * batch + WARM_UP_STEPS + 2 * arguments.steps) * tokens_per_step
        inline = Inline.open(
            model,
            num_slots=batch,
            max_context=context,
            dtype=getattr(torch, arguments.dtype),
            has_kernels=not arguments.no_kernels,
        )
        show(console, measure(inline, requests, steps=arguments.steps, drafter=arguments.drafter))


if __name__ == "__main__":
    main()

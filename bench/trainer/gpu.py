"""Speed, MFU and memory of training steps on a GPU. One command of under ten minutes:

    python bench/trainer/gpu.py

It needs Python 3.11 or later, torch, numpy and safetensors, and a checkout of this repository, which need not be installed.
Weights and states are random: a step takes as long. Each case prints a sentence, its bars, and a line of JSON. MFU is model
FLOPs over time and over the device's dense peak in bfloat16 (`updraft_trainer.learning.hardware`). FLOPs are counted as in
`updraft_trainer.learning.flops`: 2 per weight and row forward and 2 for each gradient; 4 E per head and pair of rows that
attention does not mask forward, and twice that backward. Nothing that is computed again counts, nor do the optimizer, the
average and what copies data.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = ("proto", "libs/chassis", "libs/artifacts", "libs/draft", "services/inference", "services/trainer")
sys.path[:0] = [str(REPOSITORY / root) for root in ROOTS]
try:
    import google.protobuf  # noqa: F401
except ImportError:  # it serves to read traces only, and none is read here
    for name in ("google.protobuf.message", "updraft.trace.v1"):
        sys.modules[name] = MagicMock()

import torch  # noqa: E402

from updraft_artifacts.target_description import TargetDescription  # noqa: E402
from updraft_chassis.errors import Conflict  # noqa: E402
from updraft_draft.target_weights import TargetHead  # noqa: E402
from updraft_draft.tensors import EncodedRows  # noqa: E402
from updraft_trainer.data.sample import Sample  # noqa: E402
from updraft_trainer.data.teacher import LastHidden  # noqa: E402
from updraft_trainer.learning.compiled import Compiler  # noqa: E402
from updraft_trainer.learning.compute import Compute  # noqa: E402
from updraft_trainer.learning.flops import batch_flops  # noqa: E402
from updraft_trainer.learning.hardware import device_name, peak_flops  # noqa: E402
from updraft_trainer.learning.learner import Hyperparameters, Learner  # noqa: E402

LEAST_SAMPLES_PER_S, LEAST_MFU = 4.0, 0.4
"""Bars, per H100 and for requests of 2,048 tokens."""

LIMIT_S = 540.0
"""After which no further case begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`num_samples` requests of `tokens` tokens a step, each of which is trained on."""

    tokens: int
    num_samples: int
    draft_vocab: int
    hidden: int = 4096
    inner: int = 12_288
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 151_936
    ttt_steps: int = 5
    compiles: bool = False
    recompute: bool = False

    def __str__(self) -> str:
        options = [name for name in ("compile", "recompute") if getattr(self, name.replace("compile", "compiles"))]
        return ", ".join([f"T {self.tokens:,} x {self.num_samples}", f"V_d {self.draft_vocab:,}", *options])


PACKED = Case(tokens=2048, num_samples=8, draft_vocab=32_000)
LONG = Case(tokens=8192, num_samples=2, draft_vocab=151_936)
TINY = Case(tokens=48, num_samples=2, draft_vocab=64, hidden=64, inner=96, heads=4, kv_heads=2, vocab=256, ttt_steps=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Medians over the measured steps. `mfu` and `peak_gb` are None where the device does not tell."""

    samples_per_s: float
    tokens_per_s: float
    step_ms: float
    tflops_per_s: float
    mfu: float | None
    peak_gb: float | None
    warm_up_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each case")
    parser.add_argument("--tiny", action="store_true", help="shapes for a test on a CPU")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing in all cases")
    parser.add_argument("--no-compile", action="store_true", help="only cases without torch.compile")
    arguments = parser.parse_args()
    try:
        compute = Compute.on(arguments.device)
    except Conflict as error:  # its sentence is for the trainer
        sys.exit(f"{error}. Here that is the option --device.")
    print(f"torch {torch.__version__} on {device_name(compute.device)}", flush=True)
    started_s = time.perf_counter()
    for case in _cases(arguments):
        if time.perf_counter() - started_s > LIMIT_S:
            print(f"{case}: left out, because {LIMIT_S:.0f} s are over", flush=True)
            continue
        _report(case, compute, arguments.steps)


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for case in [TINY] if arguments.tiny else [PACKED, LONG]:
        for compiles in (False,) if arguments.no_compile else (False, True):
            yield replace(case, compiles=compiles, recompute=arguments.recompute)


def _report(case: Case, compute: Compute, num_steps: int) -> None:
    try:
        figures = measure(case, compute, num_steps)
    except torch.OutOfMemoryError as error:
        print(f"{case}: out of memory: {str(error).splitlines()[0]}", flush=True)
        return
    print(f"{case}: {_sentence(figures)}", flush=True)
    if case.tokens == PACKED.tokens:
        bars = [("samples/s", figures.samples_per_s, LEAST_SAMPLES_PER_S), ("MFU", figures.mfu, LEAST_MFU)]
        for name, value, least in bars:
            outcome = "not measured" if value is None else "met" if value >= least else "missed"
            print(f"  bar {name} >= {least}: {outcome}", flush=True)
    print(json.dumps(asdict(case) | asdict(figures)), flush=True)


def _sentence(figures: Figures) -> str:
    parts = [
        f"{figures.samples_per_s:.2f} samples/s",
        f"{figures.tokens_per_s:,.0f} tokens/s",
        f"{figures.step_ms:,.0f} ms a step",
        f"{figures.tflops_per_s:,.1f} TFLOP/s",
        *([] if figures.mfu is None else [f"MFU {figures.mfu:.1%}"]),
        *([] if figures.peak_gb is None else [f"peak {figures.peak_gb:.1f} GB"]),
        f"warm-up {figures.warm_up_s:.1f} s",
    ]
    return ", ".join(parts)


def measure(case: Case, compute: Compute, num_steps: int) -> Figures:
    """Steps on the same requests, after two that are not measured."""
    gc.collect()
    has_gpu = compute.device.type == "cuda"
    if has_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    compiler = Compiler() if case.compiles else None
    compute = replace(compute, compiler=compiler, recompute=case.recompute)
    learner, samples = _learner(case, compute), _samples(case)
    started_s = time.perf_counter()
    for _ in range(2):
        _step(learner, samples)
    warm_up_s = time.perf_counter() - started_s
    times = [_step(learner, samples) for _ in range(num_steps)]
    step_s = statistics.median(times)
    batches = learner._batches(samples, [1.0] * len(samples))  # noqa: SLF001 - as a step packs them
    flops = sum(batch_flops(learner.network.config, batch, trains_head=False) for batch in batches)
    peak = peak_flops(device_name(compute.device))
    return Figures(
        samples_per_s=len(samples) / step_s,
        tokens_per_s=len(samples) * case.tokens / step_s,
        step_ms=1000 * step_s,
        tflops_per_s=flops / step_s / 1e12,
        mfu=flops / step_s / peak if peak else None,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if has_gpu else None,
        warm_up_s=warm_up_s,
    )


def _step(learner: Learner, samples: list[Sample]) -> float:
    """Seconds. A step ends by reading its loss, so a GPU has done its passes; its optimizer step counts to the next one."""
    started_s = time.perf_counter()
    report = learner.train(samples)
    if report.is_skipped or not report.num_rows:
        raise torch.OutOfMemoryError("a step was skipped; see the warning above")
    return time.perf_counter() - started_s


def _learner(case: Case, compute: Compute) -> Learner:
    target = _target(case)
    every = case.vocab // case.draft_vocab
    token_ids = torch.arange(0, case.vocab, every)[: case.draft_vocab]
    hyper = Hyperparameters(ttt_steps=case.ttt_steps)
    return Learner(target, target.draft(draft_vocab_size=case.draft_vocab), token_ids, hyper, compute=compute)


def _target(case: Case) -> TargetHead:
    content: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": case.inner,
        "num_hidden_layers": 36,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": case.hidden // case.heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    }
    files = dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight"), "model.safetensors")
    embedding = torch.randn(case.vocab, case.hidden, generator=_seeded(), dtype=torch.bfloat16)
    return TargetHead(
        config=TargetDescription.of(content, files),
        embedding=embedding,
        head=embedding,
        final_norm=torch.ones(case.hidden, dtype=torch.bfloat16),
    )


def _samples(case: Case) -> list[Sample]:
    """Requests of which every row is trained, but for those whose token the draft cannot propose."""
    generator = _seeded()

    def states(width: int) -> torch.Tensor:
        return torch.randn(case.tokens, width, generator=generator, dtype=torch.bfloat16)

    every = case.vocab // case.draft_vocab
    return [
        Sample(
            trace_id=str(number),
            aux=EncodedRows.of(states(3 * case.hidden)),
            teacher=LastHidden(states(case.hidden)),
            ids=every * torch.randint(0, case.draft_vocab, (case.tokens + 1,), generator=generator),
            first_output=1,
            corrections=torch.zeros(case.tokens + 1, dtype=torch.bool),
            is_evaluation=False,
            domain="",
            finished_unix_ms=0,
        )
        for number in range(case.num_samples)
    ]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


if __name__ == "__main__":
    main()

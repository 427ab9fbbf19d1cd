"""How well does a draft learn from the likeliest tokens alone? See README.md beside this file."""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench.teacher.traffic import Traffic, num_output_tokens, traffic, with_hidden, with_top_k

from updraft.trace.v1 import trace_pb2
from updraft_cli import output, results
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_draft import vocabulary
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.sample import ExpectedTarget, Sample, read_sample
from updraft_trainer.data.teacher import DraftVocabulary, TopK
from updraft_trainer.learning.batch import Batch
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import num_tokens, verify_steps

KS = (8, 16, 64, 128)
CHOSEN = 64
BASE = "hidden fp8"
"""What the trainer learns from by default (ADR 0007); ratios are to it."""
SEED = 7
LOOKAHEAD = 3
BATCH_SAMPLES = 4
DRAFT_VOCAB = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One form of the teacher: the samples read from its traces, and what it costs on the wire."""

    name: str
    samples: list[Sample]
    bytes_a_row: float
    packed_bytes_a_row: float
    tail: float
    """Median over rows of the probability that it does not show."""


def arms(found: Traffic, target: TargetHead, expected: ExpectedTarget) -> list[Arm]:
    """The same requests with every teacher."""
    head = target.head.bfloat16()
    forms: dict[str, Callable[[trace_pb2.Trace], trace_pb2.Trace]] = {
        BASE: lambda one: with_hidden(one, trace_pb2.TENSOR_ENCODING_FP8_E4M3),
        "hidden bf16": lambda one: with_hidden(one, trace_pb2.TENSOR_ENCODING_BF16),
    }
    for k in KS:
        forms[f"top {k}"] = lambda one, k=k: with_top_k(one, head, k)  # type: ignore[misc] # mypy: a default in a lambda
    return [_arm(name, [form(one) for one in found.learnt], expected) for name, form in forms.items()]


def _arm(name: str, traces: list[trace_pb2.Trace], expected: ExpectedTarget) -> Arm:
    samples = [read_sample(one.SerializeToString(), expected) for one in traces]
    rows, size, packed, tails = 0, 0, 0, [torch.zeros(1)]
    for one, sample in zip(traces, samples, strict=True):
        size += one.ByteSize()
        without = trace_pb2.Trace()
        without.CopyFrom(one)
        without.payload.ClearField("teacher")
        size -= without.ByteSize()
        rows += one.payload.aux_hidden.rows - one.payload.first_teacher_row
        if isinstance(sample.teacher, TopK):
            tails.append(1 - sample.teacher.log_probs.exp().sum(-1))
            id_bytes = 2 if expected.vocab_size <= 2**16 else 3
            packed += len(one.payload.top_k.ids) * (id_bytes + 2)
    return Arm(
        name=name,
        samples=samples,
        bytes_a_row=size / rows,
        packed_bytes_a_row=(packed or size) / rows,
        tail=float(torch.cat(tails[1:] or tails).median()),
    )


def train(
    found: list[Arm], target: TargetHead, *, steps: int, seed: int
) -> tuple[list[DraftNetwork], list[list[float]]]:
    """A draft for each arm, all of the same first weights and the same batches; and the processor seconds of their steps.

    Arms take their steps in turn, in an order that turns too: what else the machine does then falls on all of them.
    """
    token_ids = vocabulary.choose(
        (), always=target.config.eos_token_ids, vocab_size=target.config.vocab_size, size=DRAFT_VOCAB
    )
    config = target.config.draft(draft_vocab_size=len(token_ids))
    learners = [Learner(target, config, token_ids, Hyperparameters(), seed=seed) for _ in found]
    seconds: list[list[float]] = [[] for _ in found]
    rng, order = random.Random(seed), list(range(len(found)))
    for _ in range(steps):
        batch = rng.sample(range(len(found[0].samples)), BATCH_SAMPLES)
        order = order[1:] + order[:1]
        for n in order:
            started = time.process_time()
            learners[n].train([found[n].samples[index] for index in batch])
            seconds[n].append(time.process_time() - started)
    return [learner.network for learner in learners], seconds


@torch.no_grad()
def acceptance(network: DraftNetwork, target: TargetHead, samples: Sequence[Sample]) -> float:
    """Mean over held-out rows of the probability that sampling keeps a first draft: the sum of min(p, q), where p is the
    target's whole distribution from its exact last hidden state."""
    vocabulary_ = DraftVocabulary.of(target.head, torch.arange(target.config.vocab_size))
    everything = torch.ones(target.config.vocab_size, dtype=torch.bool)
    total, rows = 0.0, 0
    for sample in samples:
        batch = Batch.of([sample], num_steps=1, known=everything)
        with torch.autocast("cpu", torch.bfloat16):
            (state,) = network.unroll_tree(batch.aux, batch.tree, first_row=batch.first_row)
            of, column, _ = batch.text.of_step(0)
            q = F.softmax(network.logits(state[of, column]).float(), -1)
        p = batch.text.log_p(vocabulary_).exp()[:, network.token_ids]
        total += float(p.minimum(q).sum())
        rows += len(p)
    return total / rows


def measure(
    found: list[Arm], held_out: list[Sample], target: TargetHead, *, steps: int, seeds: int
) -> list[dict[str, Any]]:
    """One row for each seed and arm."""
    rows: list[dict[str, Any]] = []
    for seed in range(SEED, SEED + seeds):
        networks, seconds = train(found, target, steps=steps, seed=seed)
        for n, (arm, network) in enumerate(zip(found, networks, strict=True)):
            ratios = [mine / base for mine, base in zip(seconds[n], seconds[0], strict=True)]
            counts = verify_steps(network, held_out, lookahead=LOOKAHEAD)
            rows.append(
                {
                    "seed": seed,
                    "arm": arm.name,
                    "acceptance_length": sum(map(num_tokens, held_out)) / sum(counts),
                    "acceptance": acceptance(network, target, held_out),
                    "seconds_ratio": statistics.median(ratios[len(ratios) // 10 :]),
                    "bytes_a_row": arm.bytes_a_row,
                    "packed_bytes_a_row": arm.packed_bytes_a_row,
                    "tail": arm.tail,
                }
            )
        print(f"seed {seed}:", ", ".join(f"{row['arm']} {row['acceptance_length']:.3f}" for row in rows[-len(found) :]))
    return rows


def column(rows: list[dict[str, Any]], arm: str, name: str) -> list[float]:
    """A figure of an arm, a seed after the other."""
    return [float(row[name]) for row in rows if row["arm"] == arm]


def relative(rows: list[dict[str, Any]], arm: str, name: str) -> list[float]:
    """A figure of an arm as a part of the base's of the same seed."""
    return [mine / base for mine, base in zip(column(rows, arm, name), column(rows, BASE, name), strict=True)]


def main() -> None:
    """Measure, print one table, write bench/results/; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16, help="to learn from, of each of three domains")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="folder for the requests' traces; what it holds is not served again")
    arguments = parser.parse_args()
    started = datetime.now(UTC)
    model = model_folder(cache_folder(os.environ))
    target = read_head(model)
    served = traffic(
        model,
        num_learnt=arguments.requests,
        num_held_out=arguments.requests // 2,
        tokens=arguments.tokens,
        seed=SEED,
        keep=arguments.keep,
    )
    header = served.learnt[0].header
    expected = ExpectedTarget(
        target_fingerprint=header.target_fingerprint,
        tokenizer_fingerprint=header.tokenizer_fingerprint,
        aux_size=len(target.config.aux_layers) * target.config.hidden_size,
        hidden_size=target.config.hidden_size,
        vocab_size=target.config.vocab_size,
    )
    held_out = [
        read_sample(with_hidden(one, trace_pb2.TENSOR_ENCODING_BF16).SerializeToString(), expected)
        for one in served.held_out
    ]
    rows = measure(arms(served, target, expected), held_out, target, steps=arguments.steps, seeds=arguments.seeds)
    chosen = f"top {CHOSEN}"
    result = results.Result(
        name="teacher",
        command="make bench-teacher",
        started=started,
        commit=results.commit(),
        seed=SEED,
        machine=results.machine(),
        bars=(
            results.at_least(
                f"acceptance length with {chosen}, of that with {BASE}",
                statistics.median(relative(rows, chosen, "acceptance_length")),
                0.97,
            ),
            results.at_most(
                f"processor seconds a step with {chosen}, of those with {BASE}",
                statistics.median(column(rows, chosen, "seconds_ratio")),
                1.1,
            ),
        ),
        samples=rows,
    )
    console = output.console()
    console.print(
        f"{len(served.learnt)} requests to learn from ({num_output_tokens(served.learnt)} tokens), {len(held_out)} held out;"
        f" {arguments.steps} steps of {BATCH_SAMPLES}, {arguments.seeds} seeds"
    )
    show(rows)
    results.show_bars(console, result.bars)
    console.print(results.write(result, Path("bench/results")))
    sys.exit(results.missed(result.bars))


def show(rows: list[dict[str, Any]]) -> None:
    """One line an arm: medians over the seeds, and from the least to the most."""
    table = output.table(
        "teacher", ">bytes/row", ">packed", ">tail", ">s/step", ">length", ">of base", ">p(keep)", ">of base"
    )
    for arm in dict.fromkeys(str(row["arm"]) for row in rows):
        cells = [f"{column(rows, arm, 'bytes_a_row')[0]:.0f}", f"{column(rows, arm, 'packed_bytes_a_row')[0]:.0f}"]
        cells += [f"{column(rows, arm, 'tail')[0]:.4f}", _spread(column(rows, arm, "seconds_ratio"))]
        for name in ("acceptance_length", "acceptance"):
            cells += [_spread(column(rows, arm, name)), _spread(relative(rows, arm, name))]
        table.add_row(arm, *cells)
    output.console().print(table)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()

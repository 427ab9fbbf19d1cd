"""One learner in a process of its own, of this checkout or of an earlier commit. Runs as a file, not as a module.

It uses only what has always been there: `read_head`, `Sample`, `Learner(target, config, token_ids, hyper)`, `train(samples)`.
"""

import argparse
import json
import os
import resource
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import LastHidden, Teacher, TopK
from updraft_trainer.learning.learner import Hyperparameters, Learner

GIB = 1024**3
TOP_K = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--ttt", type=int, default=5)
    parser.add_argument("--teacher", choices=["hidden", "top-k"], default="hidden")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--limit-gib", type=float, default=10.0)
    parser.add_argument("--samples", type=Path, help="what recordings.py wrote")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.tokens:
        _long_sample(arguments)
    else:
        _steps_on_request(arguments)


def _long_sample(arguments: argparse.Namespace) -> None:
    """One optimizer step on one long sample, within a limit of memory; print its figures or where it died."""
    limit = int(arguments.limit_gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    figures: dict[str, object] = {"died": ""}
    started_s = time.perf_counter()
    try:
        target = read_head(arguments.target)
        one = _sample(target, arguments.tokens, arguments.teacher)
        config = target.draft(draft_vocab_size=arguments.vocab)
        options: dict[str, Any] = {}
        if arguments.recompute:
            from updraft_trainer.learning.compute import Compute  # noqa: PLC0415 - earlier commits do not have it

            options = {"compute": Compute(recompute=True)}
        learner = Learner(
            target, config, torch.arange(arguments.vocab), Hyperparameters(ttt_steps=arguments.ttt), **options
        )
        started_s = time.perf_counter()
        report = learner.train([one])
        figures |= {"loss": report.loss, "rows": report.num_rows}
    except RuntimeError as error:  # torch's for memory that it cannot have
        figures["died"] = _place(error)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures |= {"peak_gb": peak_kib * 1024 / 1e9, "seconds": time.perf_counter() - started_s}
    print(json.dumps(figures), flush=True)


def _place(error: RuntimeError) -> str:
    """The function of ours that could not go on, and torch's sentence."""
    name, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        name = code.co_qualname if "updraft_" in code.co_filename else name
        trace = trace.tb_next
    return f"{name}: {str(error).splitlines()[0][-160:]}"


def _sample(target: TargetHead, num_tokens: int, teacher: str) -> Sample:
    """A request of so many output tokens with random states."""
    generator = torch.Generator().manual_seed(0)
    c = target.config

    def states(width: int) -> torch.Tensor:
        return torch.randn(num_tokens, width, generator=generator).bfloat16()

    return sample(
        aux=states(len(c.aux_layers) * c.hidden_size),
        teacher=_teacher(states(c.hidden_size), c.vocab_size, teacher),
        ids=torch.randint(0, c.vocab_size, (num_tokens + 1,), generator=generator),
        first_output=1,
        corrections=torch.zeros(num_tokens + 1, dtype=torch.bool),
    )


def sample(**fields: Any) -> Sample:
    """A sample with these fields, of no request."""
    with suppress(ImportError):  # earlier commits do not have it
        from updraft_draft.tensors import EncodedRows  # noqa: PLC0415 - see above

        fields["aux"] = EncodedRows.of(fields["aux"])
    return Sample(trace_id="00", is_evaluation=False, domain="", finished_unix_ms=0, **fields)


def read(file: Path) -> list[list[Sample]]:
    """The batches that recordings.py wrote."""
    batches: list[list[dict[str, Any]]] = torch.load(file)
    return [[sample(teacher=LastHidden(one.pop("states")), **one) for one in batch] for batch in batches]


def _teacher(states: torch.Tensor, vocab_size: int, kind: str) -> Teacher:
    if kind == "hidden":
        return LastHidden(states)
    ids = (torch.arange(len(states))[:, None] * 7 + torch.arange(TOP_K) * 11) % vocab_size
    return TopK(ids, torch.linspace(-1.5, -12.0, TOP_K).expand(len(states), -1).contiguous())


def _steps_on_request(arguments: argparse.Namespace) -> None:
    """A step on the batch whose number comes on each line of stdin; print its seconds, tokens and loss.

    `N START STEP` takes each STEP-th sample of batch N from START on. With torchrun's variables this is one of many ranks.
    """
    target, batches = read_head(arguments.target), read(arguments.samples)
    config = target.draft()
    token_ids = choose_vocabulary([one for batch in batches for one in batch], target, size=config.draft_vocab_size)
    with ExitStack() as stack:
        options: dict[str, Any] = {}
        if "WORLD_SIZE" in os.environ:
            from updraft_trainer.coordination.ranks import joined  # noqa: PLC0415 - nor this
            from updraft_trainer.learning.compute import Compute  # noqa: PLC0415 - earlier commits do not have it

            ranks = stack.enter_context(joined(os.environ, torch.device("cpu")))
            options = {"compute": Compute().on_ranks(ranks)}
        _answer(Learner(target, config, token_ids, Hyperparameters(), **options), batches)


def _answer(learner: Learner, batches: list[list[Sample]]) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        number, *part = map(int, line.split())
        batch = batches[number][part[0] :: part[1]] if part else batches[number]
        started_s = time.perf_counter()
        report = learner.train(batch)
        seconds = time.perf_counter() - started_s
        tokens = sum(len(one.ids) - one.first_output for one in batch)
        print(json.dumps({"seconds": seconds, "tokens": tokens, "loss": report.loss}), flush=True)


if __name__ == "__main__":
    main()

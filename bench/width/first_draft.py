"""Where the time and the memory of a first draft go, without servers: `python -m bench.width.first_draft HIDDEN`.

The work of the trainer between the eighth request and the first publication, by the rule of teacher.py, on chunks of requests
of 2,000 tokens. Times are processor time of one core, so a busy machine changes them little.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from bench.width.learning import write_target
from bench.width.teacher import TOKENS, RuleTeacher
from bench.width.traffic import Width

from updraft_artifacts.sizing import CHUNK_BYTES
from updraft_cli import output, results
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead, read_head
from updraft_draft.tensors import EncodedRows
from updraft_inference.engine import CaptureParams, GenerationRequest
from updraft_trainer.data.frequency import choose_vocabulary
from updraft_trainer.data.sample import Sample
from updraft_trainer.data.teacher import LastHidden
from updraft_trainer.learning.learner import Hyperparameters, Learner
from updraft_trainer.publishing.estimate import num_tokens, verify_steps
from updraft_trainer.publishing.publish import snapshot

VOCABULARY, ANSWER_TOKENS = 151_936, 2_000
FITTED, JUDGES = 8, 8
BATCH = 4

T = TypeVar("T")


@dataclass(slots=True)
class Parts:
    """Seconds of one core and the peak of resident memory after each part."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def measure(self, name: str, work: Callable[[], T]) -> T:
        start_s = time.process_time()
        done = work()
        self.seconds[name] = time.process_time() - start_s
        self.peak_bytes[name] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return done


def samples(teacher: RuleTeacher, hidden: int, count: int) -> Iterator[Sample]:
    """A chunk of each of `count` requests, as engine torch sends them."""
    num_rows = min(ANSWER_TOKENS, CHUNK_BYTES // (4 * hidden + 8))
    for number in range(count):
        prompt = (TOKENS.start + number % len(TOKENS),)
        request = GenerationRequest(
            request_id="", prompt_ids=prompt, max_tokens=num_rows, capture=CaptureParams(payload=True, prompt_rows=1)
        )
        output_ids = teacher.answer(request)
        states = teacher.states(request, output_ids, 0)
        assert isinstance(states.teacher, torch.Tensor)
        yield Sample(
            trace_id=f"{number:032x}",
            aux=EncodedRows.of(states.aux[:]),
            teacher=LastHidden(states.teacher),
            ids=torch.tensor([*prompt, *output_ids]),
            first_output=1,
            corrections=torch.zeros(1 + num_rows, dtype=torch.bool),
            is_evaluation=False,
            domain="",
            finished_unix_ms=0,
        )


def first_draft(
    target: TargetHead, teacher: RuleTeacher, parts: Parts, *, has_step: bool
) -> tuple[DraftNetwork, float]:
    """The draft in closed form as it would be published, and its acceptance length on other requests."""
    chunks = list(samples(teacher, target.config.hidden_size, FITTED + JUDGES))
    fitted, judges = chunks[:FITTED], chunks[FITTED:]
    config = target.draft()
    token_ids = parts.measure(
        "choose the vocabulary", lambda: choose_vocabulary(fitted, target, size=config.draft_vocab_size)
    )
    learner = parts.measure("initial weights", lambda: Learner(target, config, token_ids, Hyperparameters()))
    draft = parts.measure(f"closed form of {FITTED} requests", lambda: learner.closed_form(fitted))
    assert draft is not None
    learner.start_from_fit(draft)
    del draft
    candidate = parts.measure("snapshot", lambda: snapshot(learner.average))
    steps = parts.measure(f"judge by {JUDGES} requests", lambda: verify_steps(candidate, judges, lookahead=3))
    if has_step:
        parts.measure(f"an optimizer step of {BATCH} samples", lambda: learner.train(fitted[:BATCH]))
    return candidate, sum(map(num_tokens, judges)) / sum(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hidden", type=int, help="hidden size of the target")
    parser.add_argument("--step", action="store_true", help="also take an optimizer step: gigabytes more at D 4096")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    width, parts = Width(hidden=arguments.hidden, vocabulary=VOCABULARY, tokens_per_s=1.0), Parts()
    with tempfile.TemporaryDirectory() as folder:
        path = write_target(Path(folder) / "target", width)
        draft, length = first_draft(read_head(path), RuleTeacher(path), parts, has_step=arguments.step)
    columns = output.table(f"D {arguments.hidden:,}", ">core", ">peak resident")
    for name, seconds in parts.seconds.items():
        columns.add_row(name, results.number(seconds, "s"), results.number(parts.peak_bytes[name] / 1e9, "GB"))
    size = sum(parameter.numel() for parameter in draft.parameters()) / 1e6
    output.console().print(columns, f"{size:,.0f} M weights; {length:.2f} tokens per verify step")


if __name__ == "__main__":
    main()

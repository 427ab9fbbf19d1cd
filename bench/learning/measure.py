"""Measure drafts on recorded requests of each kind: `python -m bench.learning.measure FOLDER ...`.

Acceptance length on held-out requests, by the exact walk, with bootstrap intervals over requests. With `--replay KIND` it also
learns from requests of that kind, from the first draft on and from scratch, or from the first draft on at each of `--rates`.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bench import harness
from bench.learning import figures, streams
from bench.learning.arms import ARMS, OURS, Arm
from bench.learning.kinds import TUNED
from bench.learning.learning import open_recorder
from bench.learning.recorder import NUM_HELD_OUT, Recorder
from bench.learning.replay import LOOKAHEAD, Replay, Run, traffic
from rich.table import Table

from updraft_cli import output
from updraft_draft import checkpoint
from updraft_draft.network import DraftNetwork
from updraft_draft.target_weights import TargetHead, read_head
from updraft_trainer.data.sample import Sample
from updraft_trainer.publishing.estimate import num_tokens, verify_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a draft: weights and config.json")
    parser.add_argument("--kinds", nargs="+", choices=TUNED, default=list(TUNED))
    parser.add_argument("--held-out", type=int, default=NUM_HELD_OUT, help="recorded requests of each kind")
    parser.add_argument("--replay", choices=TUNED, metavar="KIND", help="also learn from requests of this kind")
    parser.add_argument("--requests", type=int, default=50, help="how many requests to learn from")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[], metavar="RATE", help="adaptation rates to compare"
    )
    parser.add_argument("--arm", choices=list(ARMS), default=OURS.name, help="how to learn")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    recorder, target = open_recorder(), read_head(harness.model())
    drafts = {str(folder): _draft(folder, target) for folder in chosen.folders}
    output.console().print(lengths(drafts, recorder, chosen.kinds, chosen.held_out))
    if chosen.replay:
        kind, count = chosen.replay, chosen.requests
        training = {kind: recorder.samples(kind, count, held_out=False)}
        held_out = {kind: recorder.samples(kind, chosen.held_out, held_out=True)}
        order = traffic(streams.scratch(kind, count), training, chosen.seed)
        runs = {}
        for name, arm, draft in _starts(next(iter(drafts.items())), ARMS[chosen.arm], chosen.rates):
            replay = Replay(arm, target, held_out, seed=chosen.seed)
            if draft is not None:
                replay.start_from(draft)
            runs[name] = replay.run(order, lambda _: None)
        output.console().print(learned(runs, kind, held_out[kind]))


def _starts(
    first: tuple[str, DraftNetwork], arm: Arm, rates: Sequence[float]
) -> Iterator[tuple[str, Arm, DraftNetwork | None]]:
    """Name, arm and first draft of each run: the draft at each rate, or the draft and none."""
    name, draft = first
    for rate in rates:
        yield f"{rate:g}", replace(arm, hyper=replace(arm.hyper, adaptation_rate=rate)), draft
    if not rates:
        yield name, arm, draft
        yield "from scratch", arm, None


def lengths(drafts: dict[str, DraftNetwork], recorder: Recorder, kinds: Sequence[str], num_held_out: int) -> Table:
    """Tokens per verify step by kind."""
    rows = output.table("kind", *(f">{name}" for name in drafts))
    for kind in kinds:
        samples = recorder.samples(kind, num_held_out, held_out=True)
        tokens = [num_tokens(sample) for sample in samples]
        steps = [verify_steps(draft, samples, lookahead=LOOKAHEAD) for draft in drafts.values()]
        rows.add_row(kind, *(str(figures.acceptance_length(tokens, [one])) for one in steps))
    return rows


def learned(runs: dict[str, Run], kind: str, held_out: Sequence[Sample]) -> Table:
    """Tokens per verify step of the served draft after so many requests, and after which a version was published."""
    tokens = [num_tokens(sample) for sample in held_out]
    checkpoints = next(iter(runs.values())).checkpoints
    rows = output.table("start", *(f">{one.requests}" for one in checkpoints), ">published after")
    for name, run in runs.items():
        values = (str(figures.acceptance_length(tokens, [one.steps[kind]])) for one in run.checkpoints)
        rows.add_row(name, *values, " ".join(map(str, run.published)) or "-")
    return rows


def _draft(folder: Path, target: TargetHead) -> DraftNetwork:
    config, tensors = checkpoint.load(folder)
    return checkpoint.build(config, tensors, target.embedding)


if __name__ == "__main__":
    main()

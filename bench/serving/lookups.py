"""How good are n-gram proposals, by source? `python -m bench.serving.lookups` takes greedy answers to held-out requests of each
domain, the proposal before each of their tokens, and the tokens per step that they would give if verification were free, which
bounds every choice of drafts. See ADR 0025.
"""

import argparse
import asyncio
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from bench.serving.arms import RunSpec, request, run
from bench.serving.plan import NUM_REMEMBERED, SEED
from bench.serving.workloads import MAX_PROMPT_TOKENS, Words, mixed, prompts
from rich.console import Console
from rich.progress import Progress

from updraft_cli import output
from updraft_cli.local.folders import cache_folder
from updraft_cli.models.smollm2 import model_folder
from updraft_cli.prompts import DOMAINS
from updraft_inference.engine import Drafter
from updraft_inference.torch_engine.drafting.answer_cache import AnswerCache
from updraft_inference.torch_engine.drafting.ngram import NgramProposer
from updraft_inference.torch_engine.drafting.ngram_index import NgramIndex
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.proposal import ProposalSource
from updraft_inference.torch_engine.sequence import Sequence as Running

MOST = 10
BATCH = 8

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt and its answer."""


@dataclass(slots=True)
class Tally:
    """Proposals of one source: their number, how many had a right first token, and the number of right tokens."""

    num: int = 0
    right: int = 0
    kept: int = 0

    def add(self, ids: Sequence[int], came: Sequence[int]) -> None:
        kept = num_kept(ids, came)
        self.num += 1
        self.right += kept > 0
        self.kept += kept


@dataclass(slots=True)
class Tallies:
    """By source; num_matched 0: nothing matched."""

    own: dict[ProposalSource, Tally] = field(default_factory=lambda: defaultdict(Tally))
    earlier: dict[ProposalSource, Tally] = field(default_factory=lambda: defaultdict(Tally))
    """Matches in answers to other requests, whether or not the request's own text had one."""


def num_kept(ids: Sequence[int], came: Sequence[int]) -> int:
    """Tokens of a proposal before the first wrong one."""
    return next((i for i, (a, b) in enumerate(zip(ids, came, strict=False)) if a != b), len(ids))


def running(prompt: Sequence[int], said: Sequence[int]) -> Running:
    """A request with a part of its answer."""
    spec = RunSpec(batch=1, tokens=1 + MOST, drafter=Drafter.NGRAM)
    return Running(request=request(tuple(prompt), spec), emit=lambda _: None, ids=[*prompt, *said])


def tally(pair: Pair, history: AnswerCache, into: Tallies) -> None:
    """Count the proposals before each token of an answer except the first."""
    prompt, answer = pair
    for done in range(1, len(answer)):
        ids, rest = [*prompt, *answer[:done]], answer[done:]
        own, earlier = (each.propose(ids, min(MOST, len(rest))) for each in (NgramIndex(), history))
        into.own[own.source].add(own.ids, rest)
        into.earlier[earlier.source].add(earlier.ids, rest)


def num_steps(pair: Pair, lookups: NgramProposer) -> int:
    """Steps after the first token, each with its proposal."""
    prompt, answer = pair
    done, steps = 1, 0
    while done < len(answer):
        rest = answer[done:]
        (proposal,) = lookups.propose([running(prompt, answer[:done])], min(MOST, len(rest) - 1))
        done += 1 + num_kept(proposal.ids, rest)
        steps += 1
    return steps


def bound(pairs: Sequence[Pair], lookups: NgramProposer) -> float:
    """Tokens per step of requests that run one after the other."""
    return sum(len(answer) - 1 for _, answer in pairs) / sum(num_steps(pair, lookups) for pair in pairs)


def remembering(pairs: Iterable[Pair]) -> tuple[AnswerCache, NgramProposer]:
    """A cache and a proposer that remember these answers."""
    history, lookups = AnswerCache(NUM_REMEMBERED), NgramProposer(NUM_REMEMBERED)
    for prompt, answer in pairs:
        history.add([*prompt, *answer], len(prompt), len(prompt) + len(answer))
        lookups.finish(running(prompt, answer))
        lookups.index_all()
    return history, lookups


async def answered(engine: TorchEngine, asked: list[tuple[int, ...]], tokens: int, progress: Progress) -> list[Pair]:
    """All prompts with their greedy answers."""
    pairs: list[Pair] = []
    for start in progress.track(range(0, len(asked), BATCH), description="answering"):
        some = asked[start : start + BATCH]
        _, answers = await run(engine, some, RunSpec(batch=BATCH, tokens=tokens, drafter=Drafter.NONE))
        pairs += zip(some, answers, strict=True)
    return pairs


async def collect(num: int, tokens: int, num_earlier: int) -> tuple[dict[str, list[Pair]], list[Pair]]:
    """Held-out requests per domain with their answers, and others of all domains in turn."""
    model = model_folder(cache_folder(os.environ))
    words = Words.open(model)
    held = {domain: prompts(words, domain, num, seed=SEED, is_held_out=True) for domain in DOMAINS}
    others = {domain: prompts(words, domain, num_earlier, seed=SEED, is_held_out=False) for domain in DOMAINS}
    limits = Limits(num_slots=BATCH, max_context=MAX_PROMPT_TOKENS + 2 * tokens, max_lookahead=1)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        async with TorchEngine.open(model, EngineOptions(limits=limits, dtype=torch.bfloat16)) as engine:
            by_domain = {domain: await answered(engine, asked, tokens, progress) for domain, asked in held.items()}
            return by_domain, await answered(engine, mixed(others), 2 * tokens, progress)


def main() -> None:
    """Print a table of all domains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32, help="of each domain")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer; twice as many of the earlier ones")
    parser.add_argument("--earlier", type=int, default=48, help="requests of each domain that were answered before")
    arguments = parser.parse_args()
    by_domain, others = asyncio.run(collect(arguments.requests, arguments.tokens, arguments.earlier))
    history, lookups = remembering(others)
    table = output.table("domain", "found in", ">matched", "before it", ">of all", ">first right", ">tokens right")
    bounds = output.table("tokens a step, if verification cost nothing", ">own text", f">and {len(others)} answers")
    for domain, pairs in by_domain.items():
        bounds.add_row(domain, f"{bound(pairs, NgramProposer(0)):.2f}", f"{bound(pairs, lookups):.2f}")
        tallies = Tallies()
        for pair in pairs:
            tally(pair, history, tallies)
        for where, found in (("own text", tallies.own), ("an earlier answer", tallies.earlier)):
            total = sum(each.num for each in found.values())
            for kind, each in sorted(found.items()):
                before = (
                    "" if not kind.num_matched else "another token" if kind.is_contested else "the same, or nothing"
                )
                shares = f"{each.num / total:.2f}", f"{each.right / each.num:.2f}", f"{each.kept / each.num:.2f}"
                table.add_row(domain, where, str(kind.num_matched), before, *shares)
    output.console().print(table)
    output.console().print(bounds)


if __name__ == "__main__":
    main()

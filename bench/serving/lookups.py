"""How good are lookups, by how they were found? `python -m bench.serving.lookups`: greedy answers to held-out requests of each
domain, what would have been proposed before each of their tokens, and how many tokens a step that would give if verification
cost nothing: no choice of drafts makes lookups faster than that. See `torch_engine/ngram.py`, ADR 0020.
"""

import argparse
import asyncio
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bench.serving.arms import Wish, run
from bench.serving.plan import SEED
from bench.serving.workloads import Words, prompts

from updraft_cli import output
from updraft_cli.folders import cache_folder
from updraft_cli.model import model_folder
from updraft_cli.prompts import DOMAINS
from updraft_inference.engine.port import Drafter
from updraft_inference.torch_engine.decoder import Limits
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.ngram import NgramIndex

MOST = 10


@dataclass(slots=True)
class Tally:
    """Of proposals of one kind: how many, of how many the first token came, and tokens that came."""

    num: int = 0
    right: int = 0
    kept: int = 0


def num_kept(ids: Sequence[int], came: Sequence[int]) -> int:
    """Tokens of a proposal before the first one that did not come."""
    return next((i for i, (a, b) in enumerate(zip(ids, came, strict=False)) if a != b), len(ids))


def tally(prompt: Sequence[int], answer: Sequence[int], into: dict[int, Tally]) -> None:
    """Count what is proposed before each token of an answer but the first, by strength; 0: nothing."""
    for done in range(1, len(answer)):
        rest = answer[done:]
        lookup = NgramIndex().propose([*prompt, *answer[:done]], min(MOST, len(rest)))
        kept = num_kept(lookup.ids, rest)
        found = into[lookup.strength]
        found.num += 1
        found.right += kept > 0
        found.kept += kept


def num_steps(prompt: Sequence[int], answer: Sequence[int]) -> int:
    """Steps after the first token, each with the lookup that there is."""
    done, steps = 1, 0
    while done < len(answer):
        rest = answer[done:]
        ids = NgramIndex().propose([*prompt, *answer[:done]], min(MOST, len(rest) - 1)).ids
        done += 1 + num_kept(ids, rest)
        steps += 1
    return steps


async def tallies(domain: str, num: int, tokens: int) -> tuple[dict[int, Tally], float]:
    """Of all proposals before the tokens of so many answers; and tokens a step, by requests that run one after the other."""
    model = model_folder(cache_folder(os.environ))
    asked = prompts(Words.open(model), domain, num, seed=SEED, is_held_out=True)
    limits = Limits(num_slots=8, max_context=max(map(len, asked)) + tokens, max_lookahead=1)
    async with TorchEngine.open(model, EngineOptions(limits=limits, dtype=torch.bfloat16)) as engine:
        _, answers = await run(engine, asked, Wish(batch=8, tokens=tokens, drafter=Drafter.NONE))
    found: dict[int, Tally] = defaultdict(Tally)
    for prompt, answer in zip(asked, answers, strict=True):
        tally(prompt, answer, found)
    steps = sum(num_steps(prompt, answer) for prompt, answer in zip(asked, answers, strict=True))
    return found, sum(len(answer) - 1 for answer in answers) / steps


def main() -> None:
    """Print a table of all domains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32, help="of each domain")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    arguments = parser.parse_args()
    table = output.table("domain", ">matched", "before it", ">of all", ">first right", ">tokens right")
    bounds = output.table("domain", ">tokens a step, if verification cost nothing")
    for domain in DOMAINS:
        found, bound = asyncio.run(tallies(domain, arguments.requests, arguments.tokens))
        bounds.add_row(domain, f"{bound:.2f}")
        total = sum(each.num for each in found.values())
        for strength, each in sorted(found.items(), key=lambda pair: (abs(pair[0]), -pair[0])):
            before = "" if not strength else "another token" if strength < 0 else "the same, or nothing"
            shares = f"{each.num / total:.2f}", f"{each.right / each.num:.2f}", f"{each.kept / each.num:.2f}"
            table.add_row(domain, str(abs(strength)), before, *shares)
    output.console().print(table)
    output.console().print(bounds)


if __name__ == "__main__":
    main()

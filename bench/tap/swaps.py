"""Swaps under load: what they change, and by how much they lengthen the gap between two tokens of a stream."""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from bench.harness import Line, spread
from bench.serving.servers import MODEL
from bench.tap.plugged import ROLES, plugged
from tests.support.tap_agent import Agent, listening
from tests.support.wait import until

from updraft_cli import results
from updraft_inference.engine import DraftCheckpoint

TOKENS = 128
BETWEEN_SWAPS_S = 0.5
STRIDE_S = 2.0
PATIENCE_S = 300.0

Gap = tuple[float, float]
"""When a token came, and when the next one of its request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """From the moment at which a swap was sent to the one at which it was answered, and the engine's longest standstill."""

    start_s: float
    end_s: float
    pause_ms: float
    refusal: str


@dataclass(slots=True, kw_only=True)
class Swaps:
    """Swaps, gaps and requests of a run."""

    windows: list[Window] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    requests: int = 0
    failed: int = 0
    changed: int = 0
    quiet_from_s: float = 0.0
    """The end of the last swap."""

    @property
    def added_ms(self) -> list[float]:
        """By swap: the longest gap while it was carried out, less that in a time as long just before it."""
        return [added_ms(self.gaps, one.start_s, one.end_s) for one in self.windows]

    @property
    def added_by_nothing_ms(self) -> list[float]:
        """The same for times as long as swaps last, after the last swap: what `added_ms` cannot tell from a swap."""
        lasts_s = self.lasts_s
        ends_s = [self.quiet_from_s + 2 * lasts_s + STRIDE_S * number for number in range(len(self.windows))]
        return [added_ms(self.gaps, end_s - lasts_s, end_s) for end_s in ends_s]

    @property
    def lasts_s(self) -> float:
        """How long a swap lasts (median)."""
        return statistics.median(one.end_s - one.start_s for one in self.windows)

    def lines(self) -> list[Line]:
        """The bars."""
        added, total = self.added_ms, len(self.windows)
        refused = sum(bool(one.refusal) for one in self.windows)
        return [
            Line(results.at_most(f"refused swaps of {total}", refused, 0)),
            Line(results.at_most("failed requests during them", self.failed, 0), note=f"of {self.requests}"),
            Line(results.at_most("requests with other tokens than without swaps", self.changed, 0)),
            Line(
                results.at_most("added to the longest gap by a swap, median", statistics.median(added), 30, "ms"),
                spread(added),
            ),
            Line(results.at_most("added to the longest gap by a swap, 95th percentile", p95(added), 100, "ms")),
        ]

    def figures(self) -> Iterator[str]:
        """The figures behind the bars."""
        pauses = [one.pause_ms for one in self.windows]
        yield (
            f"The engine stood still for at most {statistics.median(pauses):.1f} ms at a time within a swap (median; longest"
            f" {max(pauses):.1f} ms), by its own clock. A swap was answered after {1e3 * self.lasts_s:.0f} ms."
        )
        nothing = self.added_by_nothing_ms
        yield (
            f"Times as long without a swap, after the last one, added {statistics.median(nothing):.0f} ms (median; quartiles"
            f" {spread(nothing)}; 95th percentile {p95(nothing):.0f} ms). The median gap was {1e3 * step_s(self.gaps):.0f} ms."
        )

    def row(self) -> dict[str, Any]:
        """For the result file; gaps are too many."""
        counts = {"requests": self.requests, "failed": self.failed, "changed": self.changed}
        added = {"added_ms": self.added_ms, "added_by_nothing_ms": self.added_by_nothing_ms}
        return {"swaps": [asdict(one) for one in self.windows], **added, **counts}


def p95(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def step_s(gaps: Sequence[Gap]) -> float:
    """The median gap, which is that of an ordinary step; 0 without gaps."""
    return statistics.median(end - begin for begin, end in gaps) if gaps else 0.0


def added_ms(gaps: Sequence[Gap], start_s: float, end_s: float) -> float:
    """The longest gap that touches the time between the two moments, less the longest that ended in a time as long before.

    Both contain gaps of ordinary steps and of prompts that were read meanwhile, so what is left is the swap's. The gaps that
    touch a time end in it or one step later, so the time before is longer by a step too.
    """
    since_s = start_s - (end_s - start_s) - step_s(gaps)
    during = [end - begin for begin, end in gaps if begin < end_s and end > start_s]
    before = [end - begin for begin, end in gaps if since_s < end <= start_s]
    return 1e3 * (max(during, default=0.0) - max(before, default=0.0))


async def measured(
    model: Path,
    drafts: Sequence[DraftCheckpoint],
    prompts: Sequence[tuple[int, ...]],
    plan: argparse.Namespace,
    at: Path,
) -> Swaps:
    """On a server of its own in float32, in which greedy tokens do not depend on the draft, with a slot for each stream."""
    options = ("--dtype", "float32", "--max-num-seqs", str(len(prompts)))
    opened = plugged(model, drafts[0].folder, at, at / "s", threads=plan.threads, options=options)
    async with opened as server:
        with server.turn():
            async with listening(at / "s", roles=ROLES) as agent:
                http = server.http
                without = await asyncio.gather(*(_tokens(http, prompt, TOKENS, []) for prompt in prompts))
                return await _swapped(http, agent, drafts, list(zip(prompts, without, strict=True)), plan.swaps)


async def _swapped(
    http: httpx.AsyncClient,
    agent: Agent,
    drafts: Sequence[DraftCheckpoint],
    expected: Sequence[tuple[tuple[int, ...], list[int]]],
    num_swaps: int,
) -> Swaps:
    found, is_over, all_run = Swaps(), asyncio.Event(), asyncio.Barrier(len(expected) + 1)

    async def stream(place: int) -> None:
        prompt, whole = expected[place]
        for turn in count():
            # The first request of each stream is cut at another place, so that they do not all end at once ever after.
            wanted = whole if turn else whole[: 1 + len(whole) * (place + 1) // (len(expected) + 1)]
            await _ask(http, prompt, wanted, found)
            if not turn:
                await all_run.wait()
            if is_over.is_set():
                return

    async with asyncio.TaskGroup() as tasks:
        for place in range(len(expected)):
            tasks.create_task(stream(place))
        await all_run.wait()
        found.gaps.clear()
        for number in range(num_swaps):
            last_s = found.windows[-1].end_s - found.windows[-1].start_s if number else 0.0
            await asyncio.sleep(BETWEEN_SWAPS_S + last_s)
            found.windows.append(await _swap(agent, drafts[(number + 1) % len(drafts)]))
        found.quiet_from_s = found.windows[-1].end_s
        await asyncio.sleep(2 * found.lasts_s + STRIDE_S * num_swaps)
        is_over.set()
    return found


async def _ask(http: httpx.AsyncClient, prompt: tuple[int, ...], wanted: list[int], found: Swaps) -> None:
    found.requests += 1
    try:
        tokens = await _tokens(http, prompt, len(wanted), found.gaps)
    except (httpx.HTTPError, KeyError, ValueError):
        found.failed += 1
        return
    found.changed += tokens != wanted


async def _swap(agent: Agent, draft: DraftCheckpoint) -> Window:
    before, start_s = len(agent.loaded), time.perf_counter()
    load = {"folder": str(draft.folder), "version": draft.version, "digest": draft.tensors_digest}
    agent.send("worker", {"kind": "load", **load})
    await until(lambda: len(agent.loaded) > before, timeout_s=PATIENCE_S, what="the answer to a swap")
    answer = agent.loaded[-1]
    end_s = time.perf_counter()
    return Window(start_s=start_s, end_s=end_s, pause_ms=answer["pause_us"] / 1e3, refusal=answer["refusal"])


async def _tokens(http: httpx.AsyncClient, prompt: tuple[int, ...], tokens: int, gaps: list[Gap]) -> list[int]:
    """Greedy tokens; the gaps between those that came apart are added to `gaps`."""
    body = {
        "model": MODEL,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    found: list[int] = []
    last_s: float | None = None
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now_s = time.perf_counter()
            if last_s is not None:
                gaps.append((last_s, now_s))
            last_s = now_s
            found += json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids") or []
    return found

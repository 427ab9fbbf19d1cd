"""Swaps under load: what they change, and by how much they lengthen the gap between two tokens of a stream."""

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from bench.harness import Line, p95, spread
from bench.serving.servers import MODEL
from bench.tap.plugged import ROLES, SOCKET, plugged
from tests.support.tap_agent import Agent, listening
from tests.support.wait import until

from updraft_cli import results
from updraft_inference.engine import DraftCheckpoint

TOKENS = 330
SWAPS_OF_REQUESTS = 5
"""So many fit into requests of so many tokens, with the times without swaps before them, if steps are not much shorter."""
BETWEEN_SWAPS_S = 0.5
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

    @property
    def added_ms(self) -> list[float]:
        """By swap: the longest gap while it was carried out, less that in a time as long just before it."""
        return [added_ms(self.gaps, one.start_s, one.end_s) for one in self.windows]

    @property
    def added_by_nothing_ms(self) -> list[float]:
        """The same for the time as long just before each swap, in which there was none: what `added_ms` cannot tell."""
        return [added_ms(self.gaps, 2 * one.start_s - one.end_s, one.start_s) for one in self.windows]

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
            f"Times as long without a swap, just before each, added {statistics.median(nothing):.0f} ms (median; quartiles"
            f" {spread(nothing)}; 95th percentile {p95(nothing):.0f} ms). The median gap was {1e3 * step_s(self.gaps):.0f} ms."
        )

    def row(self) -> dict[str, Any]:
        """For the result file; gaps are too many."""
        counts = {"requests": self.requests, "failed": self.failed, "changed": self.changed}
        added = {"added_ms": self.added_ms, "added_by_nothing_ms": self.added_by_nothing_ms}
        return {"swaps": [asdict(one) for one in self.windows], **added, **counts}


def step_s(gaps: Sequence[Gap]) -> float:
    """The median gap, which is that of an ordinary step; 0 without gaps."""
    return statistics.median(end - begin for begin, end in gaps) if gaps else 0.0


def added_ms(gaps: Sequence[Gap], start_s: float, end_s: float) -> float:
    """The longest gap that touches the time between the two moments, less the longest that ended in a time as long before.

    Both contain ordinary steps, so what is left is the swap's. The gaps that touch a time end in it or one step later, so the
    time before is longer by a step too.
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
    opened = plugged(model, drafts[0].folder, at, threads=plan.threads, options=options)
    async with opened as server:
        with server.turn():
            async with listening(at / SOCKET, roles=ROLES) as agent:
                http = server.http
                without = await asyncio.gather(*(_tokens(http, prompt, TOKENS, _ignored) for prompt in prompts))
                expected, found = list(zip(prompts, without, strict=True)), Swaps()
                following = itertools.cycle(drafts)  # the first, which is served already, is not counted
                while (left := plan.swaps - len(found.windows)) > 0:
                    await _swapped(http, agent, following, expected, found, min(left, SWAPS_OF_REQUESTS))
                return found


def _ignored(_: Gap) -> None:
    """Gaps of requests without swaps are of no interest."""


async def _swapped(
    http: httpx.AsyncClient,
    agent: Agent,
    following: Iterator[DraftCheckpoint],
    expected: Sequence[tuple[tuple[int, ...], list[int]]],
    found: Swaps,
    most: int,
) -> None:
    """All requests at once. When all prompts are read, swap one draft after the other, as long as all requests go on."""
    are_read = asyncio.Barrier(len(expected) + 1)

    async def stream(prompt: tuple[int, ...], wanted: list[int]) -> None:
        num_gaps = 0
        reading: asyncio.Task[int] | None = None

        def note(gap: Gap) -> None:
            nonlocal num_gaps, reading
            num_gaps += 1
            found.gaps.append(gap)
            if num_gaps == 1:
                reading = tasks.create_task(are_read.wait())

        await _ask(http, prompt, wanted, found, note)
        assert reading is None or reading.done(), "a request ended before all prompts were read"

    async with asyncio.TaskGroup() as tasks:
        requests = [tasks.create_task(stream(prompt, wanted)) for prompt, wanted in expected]
        await are_read.wait()
        # The first one says how long swaps take, and is not counted.
        last = found.windows[-1] if found.windows else await _swap(agent, next(following))
        assert found.windows or not last.refusal, last.refusal
        counted = 0
        while counted < most:
            await asyncio.sleep(BETWEEN_SWAPS_S + 2 * (last.end_s - last.start_s))
            last = await _swap(agent, next(following))
            if any(one.done() for one in requests):
                break
            found.windows.append(last)
            counted += 1
        assert counted, "requests ended before a single swap"


async def _ask(
    http: httpx.AsyncClient, prompt: tuple[int, ...], wanted: list[int], found: Swaps, note: Callable[[Gap], None]
) -> None:
    found.requests += 1
    try:
        tokens = await _tokens(http, prompt, len(wanted), note)
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


async def _tokens(
    http: httpx.AsyncClient, prompt: tuple[int, ...], tokens: int, note: Callable[[Gap], None]
) -> list[int]:
    """Greedy tokens; `note` gets the gaps between those that came apart."""
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
                note((last_s, now_s))
            last_s = now_s
            found += json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids") or []
    return found

"""Sizes of a run, and the prompts of a round. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from bench.serving.figures import NARROW, Cell

from updraft_cli.prompts import DOMAINS

T = TypeVar("T")

SEED = 7
LOOKAHEAD = 5
"""Draft tokens per step at most, in every arm of ours."""
NUM_REMEMBERED = 65536
"""Tokens of earlier answers that are remembered: the server's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a draft is trained: requests of each domain, tokens per answer, optimizer steps."""

    domains: tuple[str, ...]
    requests: int
    tokens: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of all parts."""

    domains: tuple[str, ...]
    batches: tuple[int, ...]
    temperatures: tuple[float, ...]
    peer_batches: tuple[int, ...] = (1, 8)
    """Batch sizes of the comparisons with others, and of `auto`."""
    tokens: int
    """Output tokens per request."""
    min_requests: int
    """Requests of a run with a smaller batch, because one prompt does not represent a domain."""
    pool: int
    """Held-out prompts per domain."""
    peer_rounds: int
    cell_rounds: int
    peer_cell_rounds: int
    """Rounds of the cells that have a bar of their own."""
    auto_rounds: int | None
    """Cells that `auto` measures at most, each time it is measured counting; None: as many as the time allows."""
    worst_s: float
    """Seconds in which the cell that is worst so far is measured again."""
    gap_rounds: int
    http_rounds: int
    overhead_steps: int
    exact_tokens: int
    exact_batches: tuple[int, ...]
    exact_lookaheads: tuple[int | None, ...]
    recipe: Recipe
    narrow: Recipe
    """The draft of `auto`: of one kind of requests only."""

    @property
    def cells(self) -> list[Cell]:
        """Every domain at every batch size and temperature."""
        return [Cell(*one) for one in product(self.domains, self.batches, self.temperatures)]

    @property
    def peer_cells(self) -> list[Cell]:
        """Greedy, at the batch sizes of the comparisons."""
        return [Cell(*one) for one in product(self.domains, self.peer_batches, (0.0,))]

    @property
    def auto_cells(self) -> list[Cell]:
        """Greedy and sampled, at the batch sizes of the comparisons. The kind that the draft knows comes first, because traffic
        shifts from it to the others."""
        domains = sorted(self.domains, key=lambda domain: domain != NARROW)
        return [Cell(*one) for one in product(domains, self.peer_batches, (0.0, 1.0))]

    def auto_schedule(self, num_measured: Mapping[Cell, int]) -> Iterator[tuple[int, Cell]]:
        """Cells with the numbers of their rounds, without end: each load of the kind that the draft knows, and then always the
        cell with the fewest rounds."""
        rounds = Counter(num_measured)
        first = [cell for cell in self.auto_cells if cell.domain == NARROW]
        while True:
            cell = first.pop(0) if first else min(self.auto_cells, key=rounds.__getitem__)
            yield rounds[cell], cell
            rounds[cell] += 1

    @property
    def cell_schedule(self) -> list[tuple[int, Cell]]:
        """Rounds of all cells, and more of those that have a bar of their own."""
        own = set(self.peer_cells)
        rounds = {cell: self.peer_cell_rounds if cell in own else self.cell_rounds for cell in self.cells}
        return [
            (round_, cell) for round_ in range(max(rounds.values())) for cell in self.cells if round_ < rounds[cell]
        ]

    def num_requests(self, batch: int) -> int:
        return max(batch, self.min_requests)


FULL = Plan(
    domains=DOMAINS,
    batches=(1, 2, 4, 8, 16),
    temperatures=(0.0, 0.7, 1.0),
    tokens=48,
    min_requests=2,
    pool=32,
    peer_rounds=6,
    cell_rounds=2,
    peer_cell_rounds=6,
    auto_rounds=None,
    worst_s=240,
    gap_rounds=7,
    http_rounds=4,
    overhead_steps=100,
    exact_tokens=32,
    exact_batches=(1, 2, 4, 8, 16),
    exact_lookaheads=(1, 3, 5, None),
    recipe=Recipe(domains=DOMAINS, requests=48, tokens=96, steps=320),
    narrow=Recipe(domains=(NARROW,), requests=200, tokens=96, steps=300),
)

QUICK = Plan(
    domains=("code", NARROW),
    batches=(1, 8),
    temperatures=(0.0, 1.0),
    tokens=12,
    min_requests=1,
    pool=8,
    peer_rounds=1,
    cell_rounds=1,
    peer_cell_rounds=1,
    auto_rounds=8,
    worst_s=1,
    gap_rounds=1,
    http_rounds=1,
    overhead_steps=10,
    exact_tokens=6,
    exact_batches=(1, 4),
    exact_lookaheads=(3, None),
    recipe=Recipe(domains=("code", "chat"), requests=10, tokens=24, steps=8),
    narrow=Recipe(domains=(NARROW,), requests=20, tokens=24, steps=8),
)
"""Checks in three to five minutes that everything runs."""


def take(pool: Sequence[T], round_: int, count: int) -> list[T]:
    """The prompts of a round: the next `count` of the pool, which repeats."""
    return [pool[(round_ * count + n) % len(pool)] for n in range(count)]

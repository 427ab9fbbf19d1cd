"""From samples to lines of the table: ratios within a round, medians with quartiles, and bars. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from bench.harness import Line, Spread, spread

from updraft_cli import results

PLAIN, NGRAM, EAGLE3, AUTO = "plain", "ngram", "eagle3", "auto"
"""Arms of our engine: without drafts, by name of the drafter, and what a server chooses by itself."""
OWN_TEXT = "own text"
"""Adaptive n-gram on a server that has answered nothing yet: it searches only each request's own text."""
TRANSFORMERS, VLLM = "transformers", "vllm"

REPEATING = ("code", "sql", "json", "math")
"""Domains in which lookup must pay."""
VLLM_DOMAINS = ("code", "sql", "math")
SLACK = 0.98
"""No cell may be slower than this share of plain, nor `auto` than this share of its best part."""
NARROW = "math"
"""Domain that the draft of `auto` has learnt."""
TRAINER_GB = 2.0
PAYS, NEVER_SLOWER = 1.3, 0.99
"""`auto`, of plain: where the draft knows the traffic, and anywhere."""


class Part(NamedTuple):
    """A part of the run: its name on the command line, and what it measures."""

    name: str
    what: str


PEERS = Part("peers", "plain decoding and transformers")
CELLS = Part("cells", "adaptive n-gram and plain decoding")
AUTOS = Part("auto", "what a server chooses by itself, and its parts")
GAP = Part("gap", "token gaps while a long prompt is read")
OVERHEAD = Part("overhead", "the share of a step outside of the model")
LOSSLESS = Part("lossless", "float32 outputs and plain ones")
HTTP = Part("http", "our server and vLLM, over HTTP")
PARTS = (PEERS, CELLS, AUTOS, GAP, OVERHEAD, LOSSLESS, HTTP)
TAUGHT = Part("auto with a draft", "with a draft of one kind")
UNTAUGHT = Part("auto without a draft", "before anything is learnt")
TRAINER = "trainer"
"""Under this name are the samples of the trainer beside."""
AUTO_PARTS = (TAUGHT, UNTAUGHT)
"""The two halves of `AUTOS`, under whose names its samples are."""
AUTO_ARMS = {TAUGHT: (PLAIN, NGRAM, EAGLE3, AUTO), UNTAUGHT: (PLAIN, AUTO)}


class Stream(NamedTuple):
    """The times of the first and the last token of a request, and its number of tokens."""

    first_s: float
    last_s: float
    num_tokens: int


class Cell(NamedTuple):
    """A kind of load."""

    domain: str
    batch: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.domain}, batch {self.batch}, temperature {self.temperature:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second of one arm in one round."""

    part: str
    cell: Cell
    arm: str
    round: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Token gaps of running streams: the longest while a long prompt was read, and the median before."""

    round: int
    longest_ms: float
    normal_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Seconds of one step, and of the model in it (forward and logits)."""

    arm: str
    batch: int
    step_ms: float
    model_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Equality:
    """Whether greedy float32 outputs equal those of plain decoding of one request at a time. `lookahead` None: adaptive."""

    arm: str
    batch: int
    lookahead: int | None
    is_equal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """A trainer beside `auto`: its optimizer steps, its peak of resident bytes, and the share of one core that it got."""

    optimizer_steps: float | None
    peak_bytes: int
    core_share: float


@dataclass(slots=True, kw_only=True)
class Measured:
    """All samples so far. It grows while the bench runs and is consistent at any time."""

    rates: list[Rate] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    equalities: list[Equality] = field(default_factory=list)
    learnt: list[Learnt] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        rates = [asdict(one) | one.cell._asdict() for one in self.rates]
        return [
            *({name: value for name, value in row.items() if name != "cell"} for row in rates),
            *({"part": GAP.name, **asdict(one)} for one in self.stalls),
            *({"part": OVERHEAD.name, **asdict(one)} for one in self.shares),
            *({"part": LOSSLESS.name, **asdict(one)} for one in self.equalities),
            *({"part": TRAINER, **asdict(one)} for one in self.learnt),
        ]

    def num_rounds(self) -> dict[Cell, int]:
        """Rounds of `auto` by cell."""
        rounds: dict[Cell, int] = {}
        for one in self.rates:
            if one.part in {part.name for part in AUTO_PARTS}:
                rounds[one.cell] = max(rounds.get(one.cell, 0), one.round + 1)
        return rounds


def of_auto(rows: Iterable[dict[str, Any]]) -> Measured:
    """The samples of `auto` among those of an earlier run."""
    measured, names = Measured(), {part.name for part in AUTO_PARTS}
    for row in rows:
        if row["part"] in names:
            cell = Cell(row["domain"], row["batch"], row["temperature"])
            own = {name: row[name] for name in ("part", "arm", "round", "tokens_per_s")}
            measured.rates.append(Rate(cell=cell, **own))
        elif row["part"] == TRAINER:
            measured.learnt.append(Learnt(**{name: value for name, value in row.items() if name != "part"}))
    return measured


def tokens_per_s(streams: Sequence[Stream], batch: int) -> float:
    """The rate of `batch` streams that run together: their tokens after the first, by the time since the first.

    This is tokens per stream-second, times the batch size. So neither prefill nor the last streams of a run, which run alone,
    count as decoding at this batch size.
    """
    tokens = sum(one.num_tokens - 1 for one in streams)
    return batch * tokens / sum(one.last_s - one.first_s for one in streams)


def stall(times: Sequence[Sequence[float]], *, sent_s: float, read_s: float, round_: int) -> Stall:
    """From the times of each stream's tokens. A gap that overlaps the reading of the prompt belongs to it. A gap before it is
    normal if all streams run."""
    all_run_s = max(of_one[0] for of_one in times)
    gaps = [pair for of_one in times for pair in pairwise(of_one)]
    reading = [end - start for start, end in gaps if end > sent_s and start < read_s]
    normal = [end - start for start, end in gaps if start >= all_run_s and end <= sent_s]
    return Stall(round=round_, longest_ms=1e3 * max(reading), normal_ms=1e3 * statistics.median(normal))


def _median(quartiles: Spread | None) -> float | None:
    return None if quartiles is None else quartiles.median


def ratios(rates: Iterable[Rate], arm: str, base: str) -> dict[Cell, list[float]]:
    """Ratios of `arm` to `base`, in each round of each cell in which both were measured."""
    pairs: dict[tuple[Cell, int], dict[str, float]] = defaultdict(dict)
    for one in rates:
        pairs[one.cell, one.round][one.arm] = one.tokens_per_s
    by_cell: dict[Cell, list[float]] = defaultdict(list)
    for (cell, _), by_arm in pairs.items():
        if arm in by_arm and base in by_arm:
            by_cell[cell].append(by_arm[arm] / by_arm[base])
    return dict(by_cell)


def lowest(by_cell: dict[Cell, list[float]]) -> Cell | None:
    """The cell with the lowest median ratio."""
    return min(by_cell, key=lambda cell: statistics.median(by_cell[cell]), default=None)


def better(rates: Sequence[Rate], arms: Sequence[str]) -> str | None:
    """The arm with the highest median rate; None if none was measured."""
    by_arm = {arm: [one.tokens_per_s for one in rates if one.arm == arm] for arm in arms}
    medians = {arm: statistics.median(values) for arm, values in by_arm.items() if values}
    return max(medians, key=medians.__getitem__, default=None)


def ratios_to_best(rates: Sequence[Rate], arm: str, others: Sequence[str]) -> list[float]:
    """Ratios of `arm` to the best of `others` in each cell, in rounds in which both were measured.

    Which one is best in a round, the other rounds say: the best of several noisy rates is flattered in its own round.
    """
    found = []
    for cell, round_ in dict.fromkeys((one.cell, one.round) for one in rates):
        of_cell = [one for one in rates if one.cell == cell]
        best = better([one for one in of_cell if one.round != round_], others)
        here = {one.arm: one.tokens_per_s for one in of_cell if one.round == round_}
        if best in here and arm in here:
            found.append(here[arm] / here[best])
    return found


def lines(measured: Measured, parts: Sequence[Part], cells: Sequence[Cell], *, has_vllm: bool) -> list[Line]:
    """The bars of the chosen parts, on the greedy cells. A bar that was not measured is missed."""
    makers: dict[Part, Callable[[Measured, Sequence[Cell]], Iterable[Line]]] = {
        PEERS: _peers,
        CELLS: _cells,
        AUTOS: _auto,
        GAP: _gap,
        OVERHEAD: _overhead,
        LOSSLESS: _lossless,
        HTTP: _http if has_vllm else lambda *_: (),
    }
    return [line for part in parts for line in makers[part](measured, cells)]


def _batches(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.batch for cell in cells})


def _of(measured: Measured, part: Part, *, batch: int | None = None) -> list[Rate]:
    return [one for one in measured.rates if one.part == part.name and one.cell.batch == (batch or one.cell.batch)]


def _compared(name: str, rates: Sequence[Rate], arm: str, base: str, target: float) -> Line:
    """A bar on the median of all paired ratios of two arms."""
    quartiles = spread(ratio for of_cell in ratios(rates, arm, base).values() for ratio in of_cell)
    medians = [spread(one.tokens_per_s for one in rates if one.arm == which) for which in (arm, base)]
    note = " and ".join(f"{which} {one.median:.0f}" for which, one in zip((arm, base), medians, strict=True) if one)
    bar = results.at_least(name, _median(quartiles), target, "x")
    return Line(bar=bar, spread=quartiles, note=f"tokens/s: {note}" if note else "")


def _peers(measured: Measured, cells: Sequence[Cell]) -> Iterator[Line]:
    for batch in _batches(cells):
        rates = _of(measured, PEERS, batch=batch)
        name = f"plain, of transformers' generate, batch {batch}"
        yield _compared(name, rates, PLAIN, TRANSFORMERS, 1.5 if batch == 1 else 2.5)


def _cells(measured: Measured, cells: Sequence[Cell]) -> Iterator[Line]:
    for cell in cells:
        of_cell = [one for one in _of(measured, CELLS) if one.cell == cell]
        target = 1.1 if cell.domain not in REPEATING else 1.4 if cell.batch == 1 else 1.15
        name = f"adaptive n-gram, of plain: {cell.domain}, batch {cell.batch}"
        yield _compared(name, of_cell, NGRAM, PLAIN, target)
    every = ratios(_of(measured, CELLS), NGRAM, PLAIN)
    worst = lowest(every)
    of_worst = spread(every[worst]) if worst else None
    bar = results.at_least("adaptive n-gram, of plain: worst cell", _median(of_worst), SLACK, "x")
    yield Line(bar=bar, spread=of_worst, note=f"{worst}; of {len(every)} cells" if worst else "")


def _auto(measured: Measured, _: Sequence[Cell]) -> Iterator[Line]:
    """By load over all kinds, by kind over all loads, and the kind that the draft knows by load."""
    for part in AUTO_PARTS:
        rates = _of(measured, part)
        loads = sorted({(one.cell.batch, one.cell.temperature) for one in rates})
        kinds = list(dict.fromkeys(one.cell.domain for one in rates))
        for batch, temperature in loads:
            of_load = [one for one in rates if (one.cell.batch, one.cell.temperature) == (batch, temperature)]
            where = f"{part.what}, batch {batch}, temperature {temperature:g}"
            if part is TAUGHT:
                known = [one for one in of_load if one.cell.domain == NARROW]
                yield _compared(f"auto, of plain: {NARROW}, {where}", known, AUTO, PLAIN, PAYS)
                yield _to_best(f"auto, of its best part: every kind, {where}", of_load)
            yield _compared(f"auto, of plain: every kind, {where}", of_load, AUTO, PLAIN, NEVER_SLOWER)
        for kind in kinds:
            of_kind = [one for one in rates if one.cell.domain == kind]
            when = "right after a shift" if part is TAUGHT and kind != NARROW else part.what
            yield _compared(f"auto, of plain: {kind}, {when}", of_kind, AUTO, PLAIN, NEVER_SLOWER)
            if part is TAUGHT:
                yield _to_best(f"auto, of its best part: {kind}, {when}", of_kind)
    yield from _trainer(measured.learnt)
    if not _of(measured, TAUGHT):  # a bar that was not measured is missed
        yield _to_best("auto, of its best part", ())


def _trainer(learnt: Sequence[Learnt]) -> Iterator[Line]:
    """That it learnt beside every slice of a run, and what it needed; nothing without a trainer."""
    if learnt:
        steps = min(one.optimizer_steps or 0 for one in learnt)
        share = statistics.median(one.core_share for one in learnt)
        note = f"{100 * share:.0f} % of a core"
        yield Line(bar=results.at_least("optimizer steps of the trainer beside", steps, 1), note=note)
        peak = max(one.peak_bytes for one in learnt) / 1e9
        yield Line(bar=results.at_most("resident memory of the trainer, peak", peak, TRAINER_GB, "GB"))


def _to_best(name: str, rates: Sequence[Rate]) -> Line:
    quartiles = spread(ratios_to_best(rates, AUTO, (PLAIN, NGRAM, EAGLE3)))
    return Line(bar=results.at_least(name, _median(quartiles), SLACK, "x"), spread=quartiles)


def _gap(measured: Measured, _: Sequence[Cell]) -> Iterator[Line]:
    quartiles = spread(one.longest_ms / one.normal_ms for one in measured.stalls)
    longest, normal = (spread(getattr(one, name) for one in measured.stalls) for name in ("longest_ms", "normal_ms"))
    note = f"{longest.median:.0f} ms, normal {normal.median:.0f} ms" if longest and normal else ""
    name = "longest token gap while a long prompt is read, in normal steps"
    yield Line(bar=results.at_most(name, _median(quartiles), 3), spread=quartiles, note=note)


def _overhead(measured: Measured, _: Sequence[Cell]) -> Iterator[Line]:
    for arm in (PLAIN, NGRAM):
        shares = [one for one in measured.shares if one.arm == arm]
        rest = spread(100 * (1 - one.model_ms / one.step_ms) for one in shares)
        step = spread(one.step_ms for one in shares)
        bar = results.at_most(f"share of a step that is not the model, {arm}, batch 8", _median(rest), 10, "%")
        yield Line(bar=bar, spread=rest, note=f"a step takes {step.median:.1f} ms" if step else "")


def _lossless(measured: Measured, _: Sequence[Cell]) -> Iterator[Line]:
    total = len(measured.equalities)
    different = [one for one in measured.equalities if not one.is_equal]
    bar = results.at_most("float32 runs whose output differs from plain", len(different) if total else None, 0)
    note = f"of {total}: drafter x batch x lookahead"
    if different:
        first = different[0]
        note += f"; first: {first.arm}, batch {first.batch}, lookahead {first.lookahead or 'adaptive'}"
    yield Line(bar=bar, note=note)


def _http(measured: Measured, cells: Sequence[Cell]) -> Iterator[Line]:
    for batch in _batches(cells):
        rates = _of(measured, HTTP, batch=batch)
        yield _compared(f"plain, of vLLM without a draft, batch {batch}", rates, PLAIN, VLLM, 1.0)
    for cell in cells:
        if cell.domain in VLLM_DOMAINS:
            of_cell = [one for one in _of(measured, HTTP) if one.cell == cell]
            name = f"adaptive n-gram, of vLLM without a draft: {cell.domain}, batch {cell.batch}"
            yield _compared(name, of_cell, NGRAM, VLLM, 1.3)

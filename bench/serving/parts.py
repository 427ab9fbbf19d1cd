"""The parts of a run. Each adds to `Bench.measured` while it runs, so that an interrupted run keeps its samples.

Arms take turns within a round. Prompts are read once before it, so that no arm finds in the prefix cache what another one had
to read.
"""

import asyncio
import copy
import hashlib
import itertools
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bench.harness import in_turn
from bench.serving import beside, figures, servers, workloads
from bench.serving.arms import RunSpec, Transformers, request, run
from bench.serving.figures import AUTO, EAGLE3, NGRAM, OWN_TEXT, PLAIN, TRANSFORMERS, VLLM, Cell
from bench.serving.inline import Inline
from bench.serving.plan import LOOKAHEAD, NUM_REMEMBERED, SEED, Plan, Recipe, take

from updraft_cli.local.folders import cache_folder
from updraft_inference.engine import DraftCheckpoint, Drafter
from updraft_inference.torch_engine.drafting.ngram import NgramProposer
from updraft_inference.torch_engine.engine import EngineOptions, TorchEngine
from updraft_inference.torch_engine.model.limits import Limits
from updraft_inference.torch_engine.scheduler.scheduler import Experience
from updraft_inference.torch_engine.sequence import Sequence

MAX_CONTEXT = 768
LONG_PROMPT_TOKENS = 2000
RUNNING_STREAMS = 7

_PAST_AT_ONCE = 16
_GAP_CONTEXT = 3072
_GAP_TOKENS = 600
"""Tokens of the running streams, more than they get while the long prompt is read."""
_NORMAL_STEPS = 16

DRAFTED = (NGRAM, EAGLE3, AUTO)
"""Arms with drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Shared by all parts. `tell` shows the current task and how much of the part is done."""

    model: Path
    words: workloads.Words
    plan: Plan
    threads: int
    tell: Callable[[str, int, int], None]
    measured: figures.Measured
    has_vllm: bool
    auto_s: float
    """Seconds after which `auto` begins no further cell."""
    has_trainer: bool = False
    """A trainer learns beside `auto`."""
    drafts: Mapping[Recipe, DraftCheckpoint] = field(default_factory=dict)
    """For the parts that use a trained draft."""
    _pools: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    _past: dict[Recipe, NgramProposer] = field(default_factory=dict)
    """The proposers of servers that have answered other requests; each is filled once."""
    _experience: dict[tuple[str, str, str], Experience] = field(default_factory=dict)
    """Experience of a server that only serves one arm of a part, and one domain."""

    @contextmanager
    def beside(self) -> Iterator[beside.Trainer | None]:
        """With a trainer beside, if this run has one. It has learnt from the requests of the narrow draft."""
        with beside.trainer(self.model, self.plan.narrow, self.tell) if self.has_trainer else nullcontext() as trainer:
            yield trainer

    def prompts(self, domain: str) -> list[tuple[int, ...]]:
        """The domain's held-out prompts."""
        if domain not in self._pools:
            held_out = workloads.prompts(self.words, domain, self.plan.pool, seed=SEED, is_held_out=True)
            self._pools[domain] = held_out
        return self._pools[domain]

    def mixed(self) -> list[tuple[int, ...]]:
        """The prompts of all domains, in turn."""
        return workloads.mixed({domain: self.prompts(domain) for domain in self.plan.domains})

    async def past(self, engine: TorchEngine, recipe: Recipe) -> NgramProposer:
        """A proposer that remembers answers to other requests, those on which a draft of the recipe is trained."""
        if recipe not in self._past:
            self._past[recipe] = await remembered(self, engine, recipe)
        return copy.deepcopy(self._past[recipe])

    async def turn(self, engine: TorchEngine, part: figures.Part, cell: Cell, arm: str, ngram: NgramProposer) -> None:
        """Let the engine go on as the server of an arm, with these remembered answers. The part's draft serves."""
        await engine.exchange_experience(replace(await self._known(engine, part, cell, arm), ngram=ngram))

    async def _known(self, engine: TorchEngine, part: figures.Part, cell: Cell, arm: str) -> Experience:
        """In `auto`, a server without a draft has served nothing, and one with a draft only the kind that this knows."""
        if part is figures.UNTAUGHT:
            return await _fresh(engine)
        domain = figures.NARROW if part is figures.TAUGHT else cell.domain
        key = (part.name, arm, domain)
        if key not in self._experience:
            self._experience[key] = await _fresh(engine)
        return self._experience[key] if cell.domain == domain else _copied(self._experience[key])

    def note(self, part: figures.Part, cell: Cell, arm: str, round_: int, streams: SequenceOf[figures.Stream]) -> None:
        """Record the rate of an arm in a round."""
        rate = figures.tokens_per_s(streams, cell.batch)
        self.measured.rates.append(figures.Rate(part=part.name, cell=cell, arm=arm, round=round_, tokens_per_s=rate))


def drafter_of(arm: str) -> Drafter | None:
    """None: what a server chooses for requests that name none."""
    return None if arm == AUTO else {PLAIN: Drafter.NONE, OWN_TEXT: Drafter.NGRAM}.get(arm) or Drafter(arm)


async def _fresh(engine: TorchEngine) -> Experience:
    """The experience of a server that has served nothing."""
    before = await engine.exchange_experience()
    return await engine.exchange_experience(before)


def _copied(experience: Experience) -> Experience:
    """An independent copy, except for costs, which belong to the machine."""
    cost = experience.planner.cost
    return copy.deepcopy(replace(experience, ngram=NgramProposer(0)), {id(cost): cost})


async def remembered(bench: Bench, engine: TorchEngine, recipe: Recipe) -> NgramProposer:
    """A proposer that remembers answers to requests that no part measures. They are answered once, and the answers kept."""
    requests = workloads.mixed(
        {d: workloads.prompts(bench.words, d, recipe.requests, seed=SEED, is_held_out=False) for d in recipe.domains}
    )
    key = hashlib.sha256(repr((bench.model.name, recipe, requests)).encode()).hexdigest()
    path = cache_folder(os.environ) / "bench" / f"answers-{key[:16]}.json"
    if not path.is_file():
        partial = path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(await _answers(bench, engine, requests, tokens=recipe.tokens)))
        partial.rename(path)
    past, spec = NgramProposer(NUM_REMEMBERED), RunSpec(batch=1, tokens=recipe.tokens, drafter=None)
    for prompt, answer in zip(requests, json.loads(path.read_text()), strict=True):
        past.finish(Sequence(request=request(prompt, spec), emit=lambda _: None, ids=[*prompt, *answer]))
        past.index_all()
    return past


async def _answers(
    bench: Bench, engine: TorchEngine, requests: list[tuple[int, ...]], *, tokens: int
) -> list[tuple[int, ...]]:
    """Answer requests; the engine's experience stays as it was."""
    before, answers = await engine.exchange_experience(), []
    for done in range(0, len(requests), _PAST_AT_ONCE):
        bench.tell("answering other requests first", done, len(requests))
        batch = requests[done : done + _PAST_AT_ONCE]
        _, outputs = await run(engine, batch, RunSpec(batch=len(batch), tokens=tokens, drafter=Drafter.NGRAM))
        answers += outputs
    await engine.exchange_experience(before)
    return answers


@asynccontextmanager
async def opened(
    bench: Bench, *, num_slots: int, dtype: torch.dtype = torch.bfloat16, max_context: int = MAX_CONTEXT
) -> AsyncIterator[TorchEngine]:
    """Our engine without a draft, after a short request."""
    limits = Limits(
        num_slots=num_slots, max_context=max_context, max_lookahead=LOOKAHEAD, num_remembered=NUM_REMEMBERED
    )
    async with TorchEngine.open(bench.model, EngineOptions(limits=limits, dtype=dtype)) as engine:
        await run(engine, [bench.words.prompt("Hello")], RunSpec(batch=1, tokens=8, drafter=Drafter.NONE))
        yield engine


async def peers(bench: Bench, engine: TorchEngine) -> None:
    """Plain decoding here and in transformers, on prompts of all domains."""
    plan, pool = bench.plan, bench.mixed()
    with Transformers.opened(bench.model, threads=bench.threads) as theirs:
        await theirs.run(pool[:1], batch=1, tokens=8)
        for round_ in range(plan.peer_rounds):
            for n, batch in enumerate(plan.peer_batches):
                cell = Cell("mixed", batch, 0.0)
                bench.tell(str(cell), round_ * len(plan.peer_batches) + n, plan.peer_rounds * len(plan.peer_batches))
                chosen = take(pool, round_, plan.num_requests(batch))
                await _read(engine, chosen)
                for arm in in_turn((TRANSFORMERS, PLAIN), round_):
                    if arm == TRANSFORMERS:
                        streams = await theirs.run(chosen, batch=batch, tokens=plan.tokens)
                    else:
                        streams, _ = await run(engine, chosen, _spec(bench, cell, arm))
                    bench.note(figures.PEERS, cell, arm, round_, streams)


async def cells(bench: Bench, engine: TorchEngine) -> None:
    """Adaptive n-gram and plain in every cell, and then again in the cell that is worst so far, for a while."""
    plan, schedule = bench.plan, bench.plan.cell_schedule
    rounds: Counter[Cell] = Counter()
    for done, (round_, cell) in enumerate(schedule):
        bench.tell(str(cell), done, len(schedule))
        arms = (PLAIN, NGRAM, OWN_TEXT) if cell in plan.peer_cells else (PLAIN, NGRAM)
        await _round(bench, engine, figures.CELLS, cell, arms, round_)
        rounds[cell] += 1
    until_s = time.monotonic() + plan.worst_s
    while time.monotonic() < until_s:
        rates = [one for one in bench.measured.rates if one.part == figures.CELLS.name]
        worst = figures.lowest(figures.ratios(rates, NGRAM, PLAIN))
        assert worst is not None
        bench.tell(f"again, the worst so far: {worst}", len(schedule), len(schedule))
        await _round(bench, engine, figures.CELLS, worst, (PLAIN, NGRAM), rounds[worst])
        rounds[worst] += 1


async def auto(bench: Bench, engine: TorchEngine) -> None:
    """A server's own choice, its parts and plain decoding, for a while: with a draft of a narrow kind on this kind and right
    after a shift to another one, and without a draft from the first request on."""
    plan, measured = bench.plan, bench.measured
    await bench.past(engine, plan.narrow)
    schedule = itertools.islice(plan.auto_schedule(measured.num_rounds()), plan.auto_rounds)
    with bench.beside() as trainer:
        until_s = time.monotonic() + bench.auto_s
        try:
            for done, (round_, cell) in enumerate(schedule):
                if time.monotonic() > until_s:
                    return
                bench.tell(f"round {round_ + 1}: {cell}", done, len(plan.auto_cells))
                for part in figures.AUTO_PARTS:
                    await engine.exchange_experience()  # a swap resets the current one, which later rounds need
                    await engine.swap(bench.drafts[plan.narrow] if part is figures.TAUGHT else None)
                    await _round(bench, engine, part, cell, figures.AUTO_ARMS[part], round_)
        finally:
            if trainer is not None:
                measured.learnt.append(trainer.learnt())


async def gap(bench: Bench) -> None:
    """Seven plain streams run, and an eighth sends a long prompt, a new one per round."""
    async with opened(bench, num_slots=RUNNING_STREAMS + 1, max_context=_GAP_CONTEXT) as engine:
        for round_ in range(bench.plan.gap_rounds):
            bench.tell("a prompt of 2,000 tokens", round_, bench.plan.gap_rounds)
            bench.measured.stalls.append(await _stall(bench, engine, round_))


async def overhead(bench: Bench) -> None:
    """Steps of plain and n-gram decoding at batch 8, on a thread that does nothing else."""
    batch, steps, pool = 8, bench.plan.overhead_steps, bench.mixed()
    async with opened(bench, num_slots=_PAST_AT_ONCE) as engine:
        past = await bench.past(engine, bench.plan.recipe)
    for n, arm in enumerate((PLAIN, NGRAM)):
        bench.tell(f"{arm}, batch {batch}", n, 2)
        tokens = (2 * batch + steps) * (LOOKAHEAD + 1)
        context = workloads.MAX_PROMPT_TOKENS + tokens
        inline = Inline.open(bench.model, num_slots=batch, max_context=context, dtype=torch.bfloat16)
        inline.look_up_in(past)
        inline.start(pool[:batch], max_tokens=tokens, drafter=drafter_of(arm))
        for _ in range(steps):
            spent = inline.step()
            bench.measured.shares.append(
                figures.Share(
                    arm=arm,
                    batch=batch,
                    step_ms=1e3 * spent.step_s,
                    model_ms=1e3 * (spent.forward_s + spent.logits_s),
                )
            )


async def lossless(bench: Bench) -> None:
    """Greedy float32 outputs of every drafter, batch size and lookahead, compared with plain decoding one by one."""
    plan = bench.plan
    prompts = take(bench.mixed(), 0, max(plan.exact_batches))
    async with opened(bench, num_slots=max(plan.exact_batches), dtype=torch.float32) as engine:
        bench.tell("plain, one request at a time", 0, 1)
        _, plain = await run(engine, prompts, RunSpec(batch=1, tokens=plan.exact_tokens, drafter=Drafter.NONE))
        await engine.swap(bench.drafts[plan.recipe])
        todo = [(a, b, k) for b in plan.exact_batches for a in DRAFTED for k in plan.exact_lookaheads]
        for done, (arm, batch, lookahead) in enumerate(todo):
            bench.tell(f"{arm}, batch {batch}, lookahead {lookahead or 'adaptive'}", done, len(todo))
            spec = RunSpec(batch=batch, tokens=plan.exact_tokens, drafter=drafter_of(arm), lookahead=lookahead)
            count = plan.num_requests(batch)
            _, outputs = await run(engine, prompts[:count], spec)
            bench.measured.equalities.append(
                figures.Equality(arm=arm, batch=batch, lookahead=lookahead, is_equal=outputs == plain[:count])
            )


async def http(bench: Bench) -> None:
    """Our server, plain and with adaptive n-gram, and vLLM. Servers without a turn are stopped."""
    plan = bench.plan
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="updraft-")))
        todo = [(r, c) for r in range(plan.http_rounds) for c in plan.peer_cells if c.domain in figures.VLLM_DOMAINS]
        bench.tell("our server starts", 0, len(todo))
        ours = await stack.enter_async_context(
            servers.updraft(bench.model, folder, threads=bench.threads, lookahead=LOOKAHEAD)
        )
        arms = {arm: (ours, {"updraft": {"drafter": drafter_of(arm)}}) for arm in (PLAIN, NGRAM)}
        if bench.has_vllm:
            bench.tell("vLLM starts and compiles (2 minutes)", 0, len(todo))
            theirs = await stack.enter_async_context(
                servers.vllm(bench.model, folder / "vllm.log", threads=bench.threads)
            )
            arms[VLLM] = (theirs, {})
        for server, more in arms.values():
            with server.turn():
                await server.run(bench.mixed()[: servers.NUM_SLOTS], batch=servers.NUM_SLOTS, tokens=8, more=more)
        for done, (round_, cell) in enumerate(todo):
            bench.tell(str(cell), done, len(todo))
            chosen = take(bench.prompts(cell.domain), round_, plan.num_requests(cell.batch))
            for arm in in_turn(tuple(arms), round_):
                server, more = arms[arm]
                with server.turn():
                    await server.run(chosen, batch=servers.NUM_SLOTS, tokens=1, more=more)
                    streams = await server.run(chosen, batch=cell.batch, tokens=plan.tokens, more=more)
                bench.note(figures.HTTP, cell, arm, round_, streams)


async def _round(
    bench: Bench, engine: TorchEngine, part: figures.Part, cell: Cell, arms: SequenceOf[str], round_: int
) -> None:
    chosen = take(bench.prompts(cell.domain), round_, bench.plan.num_requests(cell.batch))
    for arm in in_turn(arms, round_):
        # Prompts repeat between rounds, so a proposer that remembered its answers would look them up.
        recipe = bench.plan.narrow if part is figures.TAUGHT else bench.plan.recipe
        has_past = arm != OWN_TEXT and part is not figures.UNTAUGHT
        past = await bench.past(engine, recipe) if has_past else NgramProposer(0)
        await bench.turn(engine, part, cell, arm, past)
        # The draft model reads prompts too, but only in arms that use it.
        await _read(engine, chosen, drafter_of(arm))
        streams, _ = await run(engine, chosen, _spec(bench, cell, arm))
        bench.note(part, cell, arm, round_, streams)


def _spec(bench: Bench, cell: Cell, arm: str) -> RunSpec:
    return RunSpec(batch=cell.batch, tokens=bench.plan.tokens, drafter=drafter_of(arm), temperature=cell.temperature)


async def _read(
    engine: TorchEngine, prompts: SequenceOf[tuple[int, ...]], drafter: Drafter | None = Drafter.NONE
) -> None:
    await run(engine, prompts, RunSpec(batch=len(prompts), tokens=1, drafter=drafter))


async def _stall(bench: Bench, engine: TorchEngine, round_: int) -> figures.Stall:
    """One round: gaps of all running streams before the long prompt, and while it is read."""
    times: list[list[float]] = [[] for _ in range(RUNNING_STREAMS)]
    has_begun = asyncio.Event()

    async def stream(n: int, prompt: tuple[int, ...]) -> None:
        spec = RunSpec(batch=1, tokens=_GAP_TOKENS, drafter=Drafter.NONE)
        async with aclosing(engine.generate(request(prompt, spec))) as deltas:
            async for _ in deltas:
                times[n].append(time.perf_counter())
                if min(map(len, times)) > _NORMAL_STEPS:
                    has_begun.set()

    async with asyncio.TaskGroup() as tasks:
        chosen = take(bench.mixed(), round_, RUNNING_STREAMS)
        streams = [tasks.create_task(stream(n, prompt)) for n, prompt in enumerate(chosen)]
        await has_begun.wait()
        sent_s = time.perf_counter()
        await run(engine, [_long_prompt(bench, round_)], RunSpec(batch=1, tokens=1, drafter=Drafter.NONE))
        read_s = time.perf_counter()
        assert not any(task.done() for task in streams), "a stream ended while the long prompt was read"
        for task in streams:
            task.cancel()
    return figures.stall(times, sent_s=sent_s, read_s=read_s, round_=round_)


def _long_prompt(bench: Bench, round_: int) -> tuple[int, ...]:
    """Messages of all kinds, in an order by round, so that no two begin alike."""
    messages = [message for d in bench.plan.domains for message in workloads.requests(d, seed=SEED, is_held_out=True)]
    random.Random(round_).shuffle(messages)
    ids = bench.words.prompt("\n\n".join(messages[:60]))
    assert len(ids) >= LONG_PROMPT_TOKENS
    return ids[:LONG_PROMPT_TOKENS]

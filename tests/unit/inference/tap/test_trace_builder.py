"""Whatever of a run's messages comes, in whatever batches: a row is at its position or is marked as missing."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from updraft_inference.engine import CaptureParams, Drafter, HiddenStates, TopK
from updraft_inference.tap import messages
from updraft_inference.tap.trace_builder import PaintedRows, RowBlocks, Rows, StepPart, TraceBuilder
from updraft_tap import wire

K, AUX = 3, 4
WIDTH = 3
"""Drafts per step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The part of one request in one message: its header, and the numbers that its rows and teachers stand for."""

    kind: str
    header: dict[str, Any]
    rows: tuple[float, ...]
    taught: tuple[float, ...]
    tokens: tuple[int, ...] = ()
    """Positions that only this part tells of."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One simulated request. A row's number is its position; one after a rejection has 1000 more and its step's position."""

    rid: str
    num_prompt: int
    num_output: int
    cached: int
    chunk: int
    capture: CaptureParams
    accepted: list[int]
    preempted_after: int = -1
    """Steps until it is preempted and forwarded again, once."""
    parts: list[Part] = field(default_factory=list)
    lost_step: bool = False
    """The last step before the preemption was thrown away by the server."""

    def play(self) -> "Run":
        self._prefill(self.cached, self.num_prompt)
        known = self.num_prompt + 1
        for index, accepted in enumerate(self.accepted):
            if known >= self.num_prompt + self.num_output:
                break
            if index == self.preempted_after:
                if self.lost_step:
                    self._step(known - 1, min(accepted + 1, WIDTH), version=9)
                self._prefill(0, known)
                known += 1
            self._step(known - 1, accepted)
            known += accepted + 1
        while known < self.num_prompt + self.num_output:
            self._step(known - 1, 0)
            known += 1
        return self

    def _prefill(self, start: int, end: int) -> None:
        while start < end:
            stop = min(end, start + self.chunk)
            first = min(stop, max(start, self.num_prompt - self.capture.prompt_rows))
            rows = tuple(map(float, range(first, stop))) if self.capture.payload else ()
            taught = rows[-1:] if stop == end else ()
            header = {"rid": self.rid, "position": first, "cached": 0, "rows": len(rows), "teacher_rows": len(taught)}
            if self.capture.payload:
                self.parts.append(Part(kind="prefill", header=header, rows=rows, taught=taught))
            start = stop

    def _step(self, position: int, accepted: int, version: int = 7) -> None:
        limit = min(self.capture.counterfactual_rows, WIDTH - accepted) if self.capture.payload else 0
        real = tuple(float(position + i) for i in range(accepted + 1)) if self.capture.payload else ()
        rejected = tuple(1000.0 + position for _ in range(limit))
        header = {
            "rid": self.rid,
            "position": position,
            "accepted": accepted,
            "drafts": [position + i for i in range(WIDTH)],
            "log_p": [-1.0] * WIDTH,
            "rows": len(real),
            "counterfactual_rows": len(rejected),
            "version": version,
        }
        tokens = tuple(range(position + 1, position + accepted + 2))
        self.parts.append(
            Part(kind="steps", header=header, rows=real + rejected, taught=real + rejected, tokens=tokens)
        )


def frame(kind: str, parts: list[Part]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A message, as it is after its way over the socket."""
    rows = torch.tensor([row for part in parts for row in part.rows])
    taught = torch.tensor([row for part in parts for row in part.taught])
    header: dict[str, Any] = {"kind": kind, "number": 1, "dropped": 0, "requests": [part.header for part in parts]}
    if kind == "steps":
        header |= {"batch_size": len(parts), "duration_us": 1000}
    tensors = {
        "aux": rows[:, None].expand(-1, AUX).bfloat16(),
        "ids": taught[:, None].expand(-1, K).int(),
        "log_probs": -taught[:, None].expand(-1, K),
        "log_sum_exp": taught.clone(),
    }
    prefix, head, *bodies = (bytes(piece) for piece in wire.encode(header, tensors))
    assert wire.lengths(prefix) == (len(head), sum(map(len, bodies)))
    return wire.decode(head, b"".join(bodies))


def batches(runs: list[Run], rng: random.Random) -> Iterator[tuple[str, list[Part]]]:
    """The parts of all runs, each run's in order, in messages of one kind."""
    queues = [list(run.parts) for run in runs]
    while any(queues):
        first = rng.choice([queue for queue in queues if queue])
        kind = first[0].kind
        fitting = [q for q in queues if q and q[0].kind == kind]
        chosen = [q for q in fitting if q is first or rng.random() < 0.7]
        yield kind, [queue.pop(0) for queue in chosen]


def check(hidden: HiddenStates, run: Run) -> None:
    """Every row that is not marked says its own position."""
    aux = hidden.aux[:]
    exists = [row for row in range(len(hidden.aux)) if row not in hidden.missing_rows]
    for row in exists:
        position = hidden.first_position + row
        assert aux[row].tolist() == torch.full((AUX,), float(position)).bfloat16().tolist()
        if row >= hidden.first_teacher_row:
            assert isinstance(hidden.teacher, TopK)
            taught = row - hidden.first_teacher_row
            assert hidden.teacher.ids[taught].tolist() == [position] * K
            assert hidden.teacher.log_probs[taught].tolist() == [-position] * K
            assert hidden.teacher.log_sum_exp[taught] == position
    assert hidden.first_position + len(hidden.aux) == run.num_prompt + run.num_output - 1
    assert hidden.first_teacher_row + len(hidden.teacher) == len(hidden.aux)
    for one in hidden.counterfactuals:
        assert len(one.aux) == len(one.teacher)


runs = st.builds(
    Run,
    rid=st.just("a"),
    num_prompt=st.integers(1, 12),
    num_output=st.integers(1, 14),
    cached=st.just(0),
    chunk=st.integers(1, 12),
    capture=st.builds(
        CaptureParams,
        payload=st.sampled_from([True]),
        prompt_rows=st.sampled_from([0, 2, 100]),
        counterfactual_rows=st.integers(0, 3),
    ),
    accepted=st.lists(st.integers(0, WIDTH), min_size=14, max_size=14),
    preempted_after=st.integers(-1, 5),
    lost_step=st.booleans(),
)


def played(run: Run, rid: str, cached: int) -> Run:
    run.rid, run.cached = rid, min(cached, run.num_prompt - 1)
    return run.play()


@settings(deadline=None, max_examples=150)
@given(
    some=st.lists(runs, min_size=1, max_size=3),
    cached=st.integers(0, 12),
    seed=st.integers(0, 2**20),
    loss=st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9]),
)
def test_any_split_and_any_loss_leaves_rows_at_their_positions(
    some: list[Run], cached: int, seed: int, loss: float
) -> None:
    rng = random.Random(seed)
    whole = [played(run, f"r{index}", cached) for index, run in enumerate(some)]
    builders = {run.rid: TraceBuilder(run.num_prompt) for run in whole}
    for kind, parts in batches(whole, rng):
        if rng.random() >= loss:
            take(builders, kind, parts)

    for run in whole:
        builder = builders[run.rid]
        hidden, steps = builder.hidden(run.num_output), builder.steps(run.num_output)
        if hidden is not None:
            check(hidden, run)
            for one in hidden.counterfactuals:
                position = steps[one.step].start + run.num_prompt - 1
                assert one.aux[0, 0] == torch.tensor(1000.0 + position).bfloat16()
        starts = [step.start for step in steps]
        assert starts == sorted(set(starts))
        if not loss:
            assert all(step.draft_version == 7 for step in steps), "the step that was thrown away is not counted"
            assert builder.covers(run.num_output)
            check_whole(run, hidden, builder)


def check_whole(run: Run, hidden: HiddenStates | None, builder: TraceBuilder) -> None:
    """Nothing was lost: steps abut, but for the token of a second prefill, and every row of the output is there."""
    covered = {0}
    for step in builder.steps(run.num_output):
        covered |= set(range(step.start, step.start + step.emitted))
    assert len(set(range(run.num_output)) - covered) <= 1
    if hidden is None:  # a first token alone, whose row nobody asked for
        assert run.capture.prompt_rows == 0
        assert run.num_output == 1
        return
    assert not hidden.missing_rows
    wanted = max(0, run.num_prompt - run.capture.prompt_rows)
    assert hidden.first_position in {wanted, max(wanted, run.cached)}, "a second forward may show what was cached"


def test_a_cache_hit_only_moves_the_first_position() -> None:
    run = played(
        Run(
            rid="a",
            num_prompt=8,
            num_output=5,
            cached=6,
            chunk=8,
            capture=CaptureParams(payload=True, prompt_rows=4),
            accepted=[1, 1, 1],
        ),
        "a",
        6,
    )
    hidden = assembled(run).hidden(5)

    assert hidden is not None
    assert (hidden.first_position, hidden.missing_rows, hidden.first_teacher_row) == (6, (), 1)


def test_a_lost_message_leaves_a_hole_that_is_marked() -> None:
    capture = CaptureParams(payload=True, prompt_rows=100, counterfactual_rows=2)
    run = Run(rid="a", num_prompt=4, num_output=7, cached=0, chunk=4, capture=capture, accepted=[1, 1, 1]).play()
    del run.parts[2]  # the second step: rows of positions 6 and 7

    hidden = assembled(run).hidden(7)

    assert hidden is not None
    assert hidden.missing_rows == (6, 7)
    assert [one.step for one in hidden.counterfactuals] == [0, 1]


def test_steps_without_drafts_are_nobodys() -> None:
    run = Run(rid="a", num_prompt=4, num_output=3, cached=0, chunk=4, capture=CaptureParams(), accepted=[]).play()
    for part in run.parts:
        part.header["drafts"], part.header["log_p"] = [], []

    steps = assembled(run).steps(3)

    assert {(step.drafter, step.draft_version) for step in steps} == {(Drafter.NONE, 0)}


def test_steps_behind_the_end_are_not_the_requests() -> None:
    run = Run(
        rid="a", num_prompt=4, num_output=9, cached=0, chunk=4, capture=CaptureParams(), accepted=[1, 1, 1, 1]
    ).play()

    assert [step.start for step in assembled(run).steps(5)] == [1, 3]


def assembled(run: Run) -> TraceBuilder:
    builder = TraceBuilder(run.num_prompt)
    for part in run.parts:
        take({run.rid: builder}, part.kind, [part])
    return builder


def take(builders: dict[str, TraceBuilder], kind: str, parts: list[Part]) -> None:
    """Give each request its part of a message."""
    header, tensors = frame(kind, parts)
    for rid, part in messages.steps(header, tensors) if kind == "steps" else messages.prefills(header, tensors):
        if isinstance(part, StepPart):
            builders[rid].add_step(part)
        else:
            builders[rid].add_rows(part)


NOT_TAUGHT = TopK(ids=torch.ones(0, K), log_probs=torch.ones(0, K), log_sum_exp=torch.ones(0))


@given(lengths=st.lists(st.one_of(st.integers(0, 5), st.just(3000)), max_size=200))
def test_rows_of_many_small_parts_lie_together_and_are_the_same(lengths: list[int]) -> None:
    blocks, parts = RowBlocks(), [torch.rand(num, 100) for num in lengths]

    kept = [blocks.keep(Rows(position=0, aux=aux, teacher=NOT_TAUGHT)) for aux in parts]

    assert all(isinstance(rows, Rows) and rows.aux.equal(aux) for rows, aux in zip(kept, parts, strict=True))
    storages = [rows.aux.untyped_storage() for rows in kept if isinstance(rows, Rows) and len(rows.aux)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert len(sizes) <= 10 + 2 * lengths.count(3000)
    assert sum(sizes.values()) <= 2 * sum(aux.nbytes for aux in parts) + (1 << 16) + (lengths.count(3000) << 20)


def test_rows_of_longer_parts_take_at_most_a_third_more_memory() -> None:
    """A message of 25 to 30 rows at D 7168 would fill a block of 1 MiB by half."""
    blocks, parts = RowBlocks(), [torch.zeros(num, 21_508, dtype=torch.uint8) for num in 20 * (30, 25, 8)]

    kept = [blocks.keep(Rows(position=0, aux=aux, teacher=NOT_TAUGHT)) for aux in parts]

    storages = [rows.aux.untyped_storage() for rows in kept if isinstance(rows, Rows)]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert held <= sum(aux.nbytes for aux in parts) * 4 / 3 + (2 << 20)


def test_rejected_rows_lie_apart_so_that_their_memory_can_be_given_back() -> None:
    rows, blocks = Rows(position=0, aux=torch.ones(2, 3), teacher=NOT_TAUGHT), RowBlocks()
    part = StepPart(
        position=0,
        accepted=1,
        draft_ids=(1, 2),
        target_log_probs=(),
        batch_size=1,
        duration_s=0.0,
        version=1,
        rows=rows,
        rejected=rows,
    )

    kept = [blocks.keep(part) for _ in range(2)]

    places = [{each.aux.untyped_storage().data_ptr() for each in every} for every in zip(*map(both, kept), strict=True)]
    assert len(places[0]) == len(places[1]) == 1
    assert places[0] != places[1]


def both(part: Rows | StepPart) -> tuple[Rows, Rows]:
    """The rows of a step, and its rejected ones."""
    assert isinstance(part, StepPart)
    assert part.rows is not None
    assert part.rejected is not None
    return part.rows, part.rejected


def test_a_slice_of_rows_is_what_the_pieces_have_and_zero_where_none_is() -> None:
    rows = PaintedRows(5, torch.ones(1, 2))
    rows.paint(slice(1, 4), torch.tensor([True, True, False]), torch.tensor([[9.0, 9], [1, 1], [2, 2], [3, 3]]), 1)
    rows.paint(slice(3, 5), torch.tensor([True, True]), torch.tensor([[4.0, 4], [5, 5]]), 0)
    assert [row[0] for row in rows[:].tolist()] == [0, 1, 2, 4, 5]
    assert [row[0] for row in rows[2:4].tolist()] == [2, 4]
    assert rows[5:].shape == (0, 2)
    assert rows.nbytes == 6 * 2 * 4

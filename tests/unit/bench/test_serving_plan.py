"""What `make bench-serving` measures, in which order, and on which prompts."""

from collections import Counter
from itertools import islice

import pytest
from bench.serving import plan, workloads
from bench.serving.figures import NARROW, Cell
from bench.serving.plan import FULL, QUICK
from bench.serving.profile import operations

from updraft_cli.prompts import DOMAINS


def test_the_whole_run_has_every_domain_batch_size_and_temperature() -> None:
    assert len(set(FULL.cells)) == 5 * 5 * 3
    assert Cell("sql", 16, 0.7) in FULL.cells


@pytest.mark.parametrize("which", [FULL, QUICK], ids=["full", "quick"])
def test_cells_with_a_bar_of_their_own_are_measured_in_more_rounds_and_each_round_once(which: plan.Plan) -> None:
    schedule = which.cell_schedule
    assert len(set(schedule)) == len(schedule)
    rounds = Counter(cell for _, cell in schedule)
    assert set(which.peer_cells) <= set(which.cells)
    assert {rounds[cell] for cell in which.peer_cells} == {which.peer_cell_rounds}
    assert set(rounds.values()) == {which.cell_rounds, which.peer_cell_rounds}


def test_auto_begins_with_the_kind_that_its_draft_knows_and_goes_on_with_the_cells_of_the_fewest_rounds() -> None:
    cells = FULL.auto_cells
    known = [cell for cell in cells if cell.domain == NARROW]
    schedule = [cell for _, cell in islice(FULL.auto_schedule({}), 2 * len(cells))]
    assert schedule[: len(known)] == known
    assert Counter(schedule) == dict.fromkeys(cells, 2)


def test_auto_goes_on_where_an_earlier_run_ended() -> None:
    cells = FULL.auto_cells
    known, others = cells[: len(cells) // 5], cells[len(cells) // 5 :]
    earlier = dict.fromkeys([*known, *others[:3]], 1)
    schedule = list(islice(FULL.auto_schedule(earlier), len(cells)))
    assert schedule[: len(known)] == [(1, cell) for cell in known]
    assert schedule[len(known) : len(cells) - 3] == [(0, cell) for cell in others[3:]]


def test_a_round_takes_the_next_prompts_and_begins_again_after_the_last() -> None:
    assert plan.take("abcde", 0, 2) == ["a", "b"]
    assert plan.take("abcde", 2, 2) == ["e", "a"]
    assert plan.take("ab", 0, 5) == ["a", "b", "a", "b", "a"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_request_is_both_learnt_from_and_measured_on(domain: str) -> None:
    held_out = workloads.requests(domain, seed=7, is_held_out=True)
    learnt = workloads.requests(domain, seed=7, is_held_out=False)
    assert not set(held_out) & set(learnt)
    assert len(held_out) >= FULL.pool
    for recipe in (FULL.recipe, FULL.narrow):
        assert len(learnt) >= (recipe.requests if domain in recipe.domains else 0)


@pytest.mark.parametrize("domain", [domain for domain in DOMAINS if domain != "math"])
def test_every_second_request_gives_a_text_to_change(domain: str) -> None:
    changes = workloads.requests(domain, seed=7, is_held_out=True)[1:9:2]
    assert all("return" in message or "Write this statement" in message for message in changes), changes


def test_prompts_of_all_domains_come_in_turn() -> None:
    assert workloads.mixed({"a": [(1,), (2,)], "b": [(3,), (4,)]}) == [(1,), (3,), (2,), (4,)]


class Event:
    def __init__(self, key: str, input_shapes: list[list[int]], count: int, microseconds: float) -> None:
        self.key = key
        self.input_shapes = input_shapes
        self.count = count
        self.self_cpu_time_total = microseconds


def test_a_profile_tells_products_apart_by_shape_and_adds_up_to_the_step() -> None:
    events = [
        Event("aten::mm", [[1, 4], [4, 8]], 20, 4000),
        Event("aten::mm", [[1, 8], [8, 4]], 10, 1000),
        Event("aten::cat", [[1, 100]], 10, 500),
        Event("aten::cat", [[1, 101]], 10, 500),
    ]
    found = operations(events, steps=10, step_ms=0.9)
    assert [(one.name, one.shapes, one.calls) for one in found[:1]] == [("aten::mm", "1x4 4x8", 2)]
    assert sum(one.name == "aten::mm" for one in found) == 2
    assert sum(one.name == "aten::cat" for one in found) == 1
    assert sum(one.ms for one in found) == pytest.approx(0.9)

"""The simulation of drafts that look better by chance: these are no better, and the trainer's own code judges them."""

import random

import pytest
from bench.learning import false_publications as simulation
from bench.learning.false_publications import CASES, Case, Group
from rich.progress import Progress
from rich.table import Table

from updraft_rollouts.evidence import worse_tenants

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@EACH_CASE
def test_a_candidate_needs_as_many_verify_steps_for_the_mix_as_what_serves(case: Case) -> None:
    assert sum(group.share for group in case.groups) == pytest.approx(1.0)
    assert sum(group.share * group.ratio for group in case.groups) == pytest.approx(1.0)


@EACH_CASE
def test_each_kind_weighs_its_share_of_the_traffic(case: Case) -> None:
    rng, rounds = random.Random(1), 200
    drawn = [pair for _ in range(rounds) for pair in simulation.draw(case, rng)]
    total = sum(group.count for group in case.groups)
    assert len(drawn) == rounds * total
    for n, group in enumerate(case.groups):
        weight = sum(pair.weight for pair in drawn if pair.kind == str(n)) / rounds / total
        assert weight == pytest.approx(group.share, rel=0.05 if case.num_recent else 1e-9)


def test_a_draft_that_is_much_better_passes_each_way_of_judging() -> None:
    pairs = simulation.draw(Case(name="better", groups=[Group(count=12, share=0.5, ratio=0.6)] * 2), random.Random(2))
    assert [verdict(pairs) for verdict in simulation.VERDICTS] == [True, True, True]


def test_a_draft_that_is_better_for_the_mix_and_surely_worse_in_a_kind_is_not_published() -> None:
    groups = [Group(count=12, share=0.75, ratio=0.6), Group(count=12, share=0.25, ratio=1.3)]
    pairs = simulation.draw(Case(name="worse in a kind", groups=groups), random.Random(4))
    assert [verdict(pairs) for verdict in simulation.VERDICTS] == [True, True, False]


def test_an_equal_draft_looks_better_in_a_twentieth_of_draws_and_is_published_in_fewer() -> None:
    table = simulation.measured(400, Progress(disable=True))
    alike, strata, published = (float(column[0].removesuffix(" %")) for column in cells(table)[1:])
    assert alike == strata
    assert 2.0 < strata < 9.0
    assert published < strata


def test_a_tenant_is_judged_as_of_one_kind_as_the_trainer_does() -> None:
    rng = random.Random(3)
    drawn = [simulation.draw_tenant(rng) for _ in range(300)]
    found = [simulation.is_worse_off(simulation.as_one_kind(pairs)) for pairs in drawn]
    assert found == [bool(worse_tenants(pairs)) for pairs in drawn]
    assert any(found)


def test_the_same_draws_give_the_same_table_with_a_row_for_each_case() -> None:
    one, other = (simulation.measured(20, Progress(disable=True)) for _ in range(2))
    assert cells(one) == cells(other)
    assert len(cells(one)[0]) == len(CASES) + len(simulation.UNEQUAL) + 1


def cells(table: Table) -> list[list[str]]:
    return [[str(cell) for cell in column.cells] for column in table.columns]

"""The lineage as a graph: lines do not cross versions, and the line that serves stays straight."""

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from tests.support import console

from updraft_cli.backends.drafts import Draft
from updraft_cli.ui.views.lineage import MAX_NODES, STEP_X, Lineage, lineage


def draft(number: int, parent: int | None, phase: str = "superseded") -> Draft:
    return replace(console.draft(number, 1, 1), parent=parent, phase=phase)


def rows(graph: Lineage) -> dict[int, int]:
    return {node.version: node.y for node in graph.nodes}


def test_what_won_stays_on_one_line_and_what_lost_hangs_below() -> None:
    graph = lineage([draft(1, None), draft(2, 1, "rejected"), draft(3, 1), draft(4, 3, "stable")])
    placed = rows(graph)
    assert placed[1] == placed[3] == placed[4]
    assert placed[2] > placed[1]
    assert [edge.is_kept for edge in graph.edges] == [False, True, True]


def test_versions_without_a_parent_are_roots() -> None:
    graph = lineage([draft(1, 0), draft(2, None), draft(3, 99)])
    assert len(graph.nodes) == 3
    assert graph.edges == ()


def test_only_the_newest_are_drawn_and_the_rest_is_counted() -> None:
    graph = lineage([draft(number, number - 1) for number in range(1, 201)])
    assert (len(graph.nodes), graph.num_hidden, graph.nodes[-1].version) == (MAX_NODES, 200 - MAX_NODES, 200)
    assert graph.width < MAX_NODES * STEP_X + STEP_X


def test_nothing_makes_no_graph() -> None:
    assert lineage([]).nodes == ()


parents = st.lists(st.integers(min_value=0, max_value=30), max_size=30)


@given(parents, st.lists(st.sampled_from(["superseded", "rejected", "stable", "failed"]), min_size=30, max_size=30))
def test_no_two_versions_share_a_place_and_no_line_runs_through_a_version(
    numbers: list[int], phases: list[str]
) -> None:
    drafts = [
        draft(number, parent % number if number else 0, phase)
        for number, (parent, phase) in enumerate(zip(numbers, phases, strict=False), 1)
    ]
    graph = lineage(drafts)
    places = {(node.x, node.y) for node in graph.nodes}
    assert len(places) == len(graph.nodes)
    assert _crossed(drafts, graph) == []


def _crossed(drafts: Iterable[Draft], graph: Lineage) -> list[tuple[int, int]]:
    """Versions that stand in the row of a child between it and its parent."""
    nodes = {node.version: node for node in graph.nodes}
    return [
        (draft.version or 0, node.version)
        for draft in drafts
        if draft.parent in nodes
        for node in graph.nodes
        if node.y == nodes[draft.version or 0].y and nodes[draft.parent].x < node.x < nodes[draft.version or 0].x
    ]

"""The lineage of versions as a graph: a column for each version, a row for each line of descent that goes on.

A version takes its parent's row if it is the first child that is still in the graph, else the first row that is free from its
parent's column on. So the line that serves stays straight, and attempts that lost hang below it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from updraft_cli.backends.drafts import Draft
from updraft_cli.backends.speculators import LOST
from updraft_cli.ui.views import parts

STEP_X, STEP_Y, WIDTH, HEIGHT, MARGIN = 92, 56, 68, 34, 12
MAX_NODES = 60
"""Newest versions that the graph shows; the table has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    version: int
    phase: str
    label: str
    """Second line: the acceptance length, or the phase."""
    title: str
    x: int
    y: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    path: str
    """A path of SVG from parent to child."""
    is_kept: bool
    """The child did not lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    width: int
    height: int
    num_hidden: int
    """Older versions that are left out."""


def lineage(drafts: Iterable[Draft]) -> Lineage:
    numbered = sorted(drafts, key=lambda draft: draft.version)
    shown = numbered[-MAX_NODES:]
    rows = _rows(shown)
    nodes = {draft.version: _node(draft, column, rows[draft.version]) for column, draft in enumerate(shown)}
    edges = (
        Edge(path=_path(nodes[draft.parent], nodes[draft.version]), is_kept=draft.phase not in LOST)
        for draft in shown
        if draft.parent in nodes
    )
    return Lineage(
        nodes=tuple(nodes.values()),
        edges=tuple(edges),
        width=len(shown) * STEP_X - (STEP_X - WIDTH) + 2 * MARGIN,
        height=(max(rows.values(), default=0) + 1) * STEP_Y - (STEP_Y - HEIGHT) + 2 * MARGIN,
        num_hidden=len(numbered) - len(shown),
    )


def _rows(drafts: Sequence[Draft]) -> dict[int, int]:
    """Return the row of each version. `drafts` are in ascending order."""
    columns = {draft.version: column for column, draft in enumerate(drafts)}
    heirs = _heirs(drafts)
    rows: dict[int, int] = {}
    ends: dict[int, int] = {}
    """The last column that each row is taken up to."""
    for column, draft in enumerate(drafts):
        number = draft.version
        parent = draft.parent if draft.parent in rows else None
        if parent is not None and heirs.get(parent) == number:
            row = rows[parent]
        else:
            start = columns[parent] + 1 if parent is not None else column
            row = next(row for row in range(len(drafts) + 1) if ends.get(row, -1) < start)
        rows[number], ends[row] = row, max(ends.get(row, -1), _last_heir(columns, heirs, number, column))
    return rows


def _heirs(drafts: Sequence[Draft]) -> dict[int, int]:
    """Return for each version the child that continues its row: the first that has not lost, else the first."""
    heirs: dict[int, int] = {}
    for draft in sorted(drafts, key=lambda draft: (draft.phase in LOST, draft.version)):
        if draft.parent:
            heirs.setdefault(draft.parent, draft.version)
    return heirs


def _last_heir(columns: dict[int, int], heirs: dict[int, int], number: int, column: int) -> int:
    """Return the column in which the row of a version ends, so that no other line crosses it."""
    while number in heirs and heirs[number] in columns:
        number = heirs[number]
        column = columns[number]
    return column


def _node(draft: Draft, column: int, row: int) -> Node:
    return Node(
        version=draft.version,
        phase=(draft.phase or "none").replace(" ", "-"),
        label=f"{acceptance.length:.2f}" if (acceptance := parts.known(draft.acceptance)) else draft.phase,
        title=f"Version {draft.version}, {draft.phase}: {draft.reason}",
        x=MARGIN + column * STEP_X,
        y=MARGIN + row * STEP_Y,
    )


def _path(parent: Node, child: Node) -> str:
    x, y, end_x, end_y = parent.x + WIDTH, parent.y + HEIGHT // 2, child.x, child.y + HEIGHT // 2
    bend = min(x + (STEP_X - WIDTH), end_x)
    return f"M{x} {y} C{bend} {y} {x} {end_y} {bend} {end_y} L{end_x} {end_y}"

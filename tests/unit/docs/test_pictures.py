"""The pictures of the docs are those that the command draws, from the run, the code and the page that they name."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from tools.pictures import gate, recorded, svg, swap, tables
from tools.pictures.gallery import drawn

from updraft_registry.rollout.gate import Verdict
from updraft_rollouts.policy import Analysis

ROOT = Path(__file__).parents[3]
IMAGES = ROOT / "docs" / "images"
PAGE = """# Page

## First
| of | a | b |
|---|---|---|
| x | **1.66x** (1.35 to 2.19) | 1,234 MB/s |

## Second
Text.
"""


@pytest.fixture(scope="module")
def pictures() -> dict[str, str]:
    return drawn()


def test_every_committed_picture_is_what_the_command_draws(pictures: dict[str, str]) -> None:
    committed = {path.name: path.read_text() for path in IMAGES.glob("*.svg")}
    assert committed.keys() == pictures.keys()
    assert [name for name in pictures if committed[name] != pictures[name]] == [], "run `make pictures`"


def test_every_picture_is_on_a_page_and_says_in_words_what_it_shows(pictures: dict[str, str]) -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    described = set(re.findall(r"!\[[^\]]{20,}\]\(images/([\w-]+\.svg)\)", text))
    assert described == pictures.keys()


def test_every_picture_is_svg_with_a_title_and_colors_that_both_schemes_have(pictures: dict[str, str]) -> None:
    assert svg.LIGHT.keys() == svg.DARK.keys()
    for name, picture in pictures.items():
        root = ET.fromstring(picture)  # noqa: S314 - our own
        assert root.find("{http://www.w3.org/2000/svg}title") is not None, name
        assert set(re.findall(r"var\(--([\w-]+)\)", picture)) <= svg.LIGHT.keys(), name


def test_nothing_is_drawn_outside_of_a_picture(pictures: dict[str, str]) -> None:
    for name, picture in pictures.items():
        root = ET.fromstring(picture)  # noqa: S314 - our own
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            x, y = (float(element.attrib.get(side, 0)) for side in ("x", "y"))
            right, bottom = (float(element.attrib.get(side, 0)) for side in ("width", "height"))
            assert 0 <= x <= x + right <= width, (name, element.attrib)
            assert 0 <= y <= y + bottom <= height, (name, element.attrib)


def test_the_gates_picture_has_one_canary_of_each_verdict() -> None:
    verdicts = [[look.verdict for look in gate.looks(case, Analysis())] for case in gate.CASES]
    assert [looks[-1] for looks in verdicts] == [Verdict.PASS, Verdict.HOLD, Verdict.FAIL]
    assert len(verdicts[1]) == gate.NUM_SLICES


def test_the_recorded_run_is_one_request_with_a_swap_in_it() -> None:
    run = recorded.read()
    versions = [step.version for step in run.steps]
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}
    first = next(step for step in run.steps if step.version == 2)
    assert run.swap.began < first.ended_ms
    assert 0 < run.swap.pause < run.swap.ended - run.swap.began
    assert "version 2" in swap.picture()
    for step in run.steps:
        assert 0 <= step.accepted <= len(step.drafts)


def test_a_chart_reads_figures_with_their_intervals_from_a_table() -> None:
    table = tables.table(PAGE, "First")
    assert table.heads == ["of", "a", "b"]
    first, second = map(tables.figure, table.row("x"))
    assert (first.value, first.low, first.high, first.is_bold) == (1.66, 1.35, 2.19, True)
    assert (second.value, second.low, second.is_bold) == (1234.0, None, False)


def test_a_chart_of_a_figure_that_the_page_does_not_have_is_an_error() -> None:
    with pytest.raises(KeyError, match="no heading 'Third'"):
        tables.table(PAGE, "Third")
    with pytest.raises(KeyError, match="'Second' has 0 tables"):
        tables.table(PAGE, "Second")
    with pytest.raises(KeyError, match="no row 'y'"):
        tables.table(PAGE, "First").row("y")
    with pytest.raises(ValueError, match="does not begin with a number"):
        tables.figure("none")

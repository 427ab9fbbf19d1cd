import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.support.clock import ManualClock
from tests.support.demo_run import recorded, report_of

from updraft_cli.demo import charts, page
from updraft_cli.demo.page import render, write
from updraft_cli.demo.plan import Arm, SegmentName, make_plan
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import Report


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of(recorded())


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render(report)


class Elements(HTMLParser):
    """Ids and addresses of a page, and whether its tags are balanced."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href"}:
                self.references.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def elements(html: str) -> Elements:
    found = Elements()
    found.feed(html)
    found.close()
    return found


def test_the_page_needs_nothing_else(html: str) -> None:
    found = elements(html)
    assert not {"script", "link", "img", "iframe"} & found.tags
    assert all(reference.startswith("#") for reference in found.references)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_the_page_is_well_formed_and_its_charts_do_not_share_ids(html: str) -> None:
    found = elements(html)
    assert found.open == []
    assert len(set(found.ids)) == len(found.ids)
    assert {reference.removeprefix("#") for reference in found.references} <= set(found.ids)
    clips = re.findall(r"url\(#([^)]+)\)", html)
    assert clips
    assert set(clips) <= set(found.ids)


def test_the_page_tells_the_result_and_where_a_part_of_the_default_was_faster(html: str) -> None:
    assert "43 % more than the same draft frozen at the shift" in html
    assert "1.05 times as fast with `--drafter ngram` in first (code), " in html
    assert "✗ missed" in html


def test_the_report_has_the_speed_over_the_run_beside_the_acceptance(html: str, report: Report) -> None:
    figure = charts.run_chart(report)
    assert [axes.get_ylabel() for axes in figure.axes] == ["tokens per verify step", "tokens per second,\nlive traffic"]
    numbers: Any = figure.axes[1].lines[-1].get_xdata()
    assert len(numbers) > 100
    assert "Below: tokens per second of the live traffic" in html


def test_a_reason_from_outside_cannot_write_html() -> None:
    recording = recorded()
    recording.transitions[0] = recording.transitions[0].model_copy(update={"reason": "<script>alert(1)</script>"})
    assert "<script" not in render(report_of(recording))


def test_a_stopped_run_says_so() -> None:
    html = render(report_of(recorded(segments=2), stopped_by="it was stopped by hand."))
    assert "<strong>Incomplete:</strong> it was stopped by hand." in html


def test_a_run_that_measured_nothing_still_has_a_page() -> None:
    recording = Recording(plan=make_plan(minutes=1, streams=1, seed=0), clock=ManualClock())
    recording.begin(SegmentName.FIRST, "code")
    html = render(report_of(recording, stopped_by="it was stopped by hand."))
    assert "✗ not measured" in html
    assert elements(html).open == []


def test_the_same_report_gives_the_same_page(report: Report, html: str) -> None:
    assert render(report) == html


def test_page_picture_and_data_are_written(report: Report, tmp_path: Path) -> None:
    written = write(report, tmp_path)
    assert written == tmp_path / page.PAGE
    assert (tmp_path / page.PICTURE).read_bytes().startswith(b"\x89PNG")
    read = Report.model_validate_json((tmp_path / page.DATA).read_text())
    assert read == report
    assert read.summary.acceptance_length[Arm.FROZEN][SegmentName.SHIFTED] == 1.2

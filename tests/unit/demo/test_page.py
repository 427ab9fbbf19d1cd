import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.support.clock import ManualClock
from tests.support.console import memory_backend, state
from tests.support.demo_run import recorded, report_of

from updraft_cli.demo import charts, page
from updraft_cli.demo.page import render, write
from updraft_cli.demo.plan import Arm, SegmentName, make_plan
from updraft_cli.demo.recording import Recording
from updraft_cli.demo.report import Report
from updraft_cli.ui.server import serving


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


def test_the_page_needs_nothing_else_and_permits_only_its_own_scripts(html: str) -> None:
    found = elements(html)
    assert not {"link", "img", "iframe"} & found.tags
    assert found.references == []
    assert "@import" not in html
    assert "url(" not in html
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; ")
    scripts = re.findall(r'<script(?: type="module")?>(.*?)</script>', html, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']*)'", policy) == digests


def test_the_page_is_well_formed(html: str) -> None:
    found = elements(html)
    assert found.open == []
    assert len(set(found.ids)) == len(found.ids)


def test_the_charts_of_the_console_are_on_the_page_with_their_points(report: Report) -> None:
    start_s, end_s = report.started.timestamp(), report.parts[-1].ended_s
    chart: dict[str, Any] = {
        "title": "Loss </script> of the last step",
        "unit": "nats per token",
        "zero": False,
        "start": None,
        "times": [start_s - 1.0, start_s + 60.0, start_s + 61.0],
        "series": [{"label": "loss", "values": [3.5, 2.5, 1.5]}],
        "bands": [],
        "marks": [{"time": start_s + 61.0, "label": "1 pod to version 2", "kind": "swap"}],
    }
    html = render(report.model_copy(update={"charts": {"loss": chart}}))
    assert elements(html).open == []
    points = [
        json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    ]
    assert [one["title"] for one in points][-1] == chart["title"]
    assert points[-1]["times"] == [0.0, 60.0, 61.0, end_s], "since the start, as all charts of the page"
    assert points[-1]["series"] == [{"label": "loss", "values": [None, 2.5, 1.5, None]}]
    assert {(one["times"][0], one["times"][-1]) for one in points} == {(0.0, end_s)}
    assert '<td class="mono">1:01</td>' in html
    assert '<span class="mono">1:01</span> 1 pod to version 2' in html, "marks are in words too"


def test_a_page_whose_scripts_do_not_run_has_open_tables_and_says_so(html: str) -> None:
    assert html.count("This chart needs a script, which does not run here") == html.count("<details open>") > 1


def test_the_charts_of_a_console_are_read_as_far_as_it_answers() -> None:
    with serving(memory_backend(state(name="default"))) as console:
        read = charts.read(["http://127.0.0.1:9/?token=old", console.address])
        address = console.address
    assert {"acceptance", "loss", "held-out", "throughput"} <= read.keys()
    assert read["loss"]["series"][0]["values"][-1] == 1.234
    assert charts.read([address]) == {}, "it has ended"
    assert charts.read([]) == {}


def test_the_page_tells_the_result_and_where_a_part_of_the_default_was_faster(html: str) -> None:
    assert "43 % more than the same draft frozen at the shift" in html
    assert "1.05 times as fast with `--drafter ngram` in first (code), " in html
    assert "✗ missed" in html


def test_the_arms_are_measured_side_by_side_with_a_gap_between_segments(report: Report) -> None:
    chart = charts.arms(report)
    adaptive, frozen_draft, lookup, _ = (line["values"] for line in chart["series"])
    assert sum(value is not None for value in lookup) == len(report.parts), "only where it was measured"
    assert adaptive.count(None) == len(report.parts) - 1
    num_first = sum(point.segment is SegmentName.FIRST for point in report.points)
    assert frozen_draft[:num_first] == [None] * num_first, "before the shift it is the adaptive draft"
    assert chart["times"] == sorted(chart["times"])
    assert [mark["label"] for mark in chart["marks"] if mark["kind"] == "shift"] == ["shift to math", "code again"]
    assert sum(mark["kind"] == "swap" for mark in chart["marks"]) == len(report.swaps)


def test_the_speed_of_live_traffic_is_that_of_all_streams(report: Report) -> None:
    chart = charts.live_speed(report)
    (line,) = chart["series"]
    assert len(line["values"]) > 100
    request = report.requests[-1]
    assert line["values"][-1] == pytest.approx(report.streams * request.output_tokens / request.duration_s)


def test_a_reason_from_outside_cannot_write_html() -> None:
    recording = recorded()
    recording.transitions[0] = recording.transitions[0].model_copy(update={"reason": "<script>alert(1)</script>"})
    html = render(report_of(recording))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>alert" not in html


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


def test_page_and_data_are_written(report: Report, tmp_path: Path) -> None:
    written = write(report, tmp_path)
    assert written == tmp_path / page.PAGE
    read = Report.model_validate_json((tmp_path / page.DATA).read_text())
    assert read == report
    assert read.summary.acceptance_length[Arm.FROZEN][SegmentName.SHIFTED] == 1.2

import io
from pathlib import Path

import pytest
from rich.console import Console
from tests.support.demo_run import recorded, report_of

from updraft_cli.demo import outcome
from updraft_cli.demo.page import PAGE
from updraft_cli.demo.progress import Progress, progress_line, progress_view, sparkline
from updraft_cli.demo.recording import Recording
from updraft_cli.local.process import Changed, Process, State


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=140)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def recording() -> Recording:
    made = recorded(segments=1)
    made.begin(made.plan.segments[1].name, "math")
    made.doing = "live traffic"
    return made


def test_a_sparkline_is_clipped_to_its_range() -> None:
    assert sparkline([0.5, 1.0, 2.5, 4.0, 9.0], low=1.0, high=4.0) == "▁▁▅██"


def test_the_view_has_a_line_for_each_segment_and_one_for_now(recording: Recording, console: Console) -> None:
    console.print(progress_view(recording))
    lines = printed(console).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["segment", "first", "shifted", "returned"]
    assert lines[1].split()[-1] == "56"
    assert lines[4].startswith("live traffic; draft 2, 2 swaps; trainer at step 860, candidate 1.55 against 1.51;")
    assert lines[4].endswith("left")


def test_a_line_for_a_pipe_tells_the_same(recording: Recording) -> None:
    assert progress_line(recording).startswith("2:38  shifted (math): 0 requests;  live traffic; draft 2, 2 swaps")


def test_a_process_that_was_started_again_is_noted(recording: Recording, console: Console) -> None:
    inference = Process(name="inference", command=(), is_ready=lambda: True)
    listen = Progress(console, recording).listen
    listen(Changed(process=inference, state=State.READY, after_s=6.0))
    listen(Changed(process=inference, state=State.RESTARTING, reason="was killed by SIGKILL"))
    assert recording.restarts == ["inference was killed by SIGKILL"]
    assert "inference ready in 6.0 s" in printed(console)


def test_the_outcome_names_missed_bars_and_the_page(console: Console) -> None:
    outcome.show(console, report_of(recorded()), Path("demo-report", PAGE))
    told = printed(console)
    assert "1 of 9 bars missed." in told
    assert "demo-report/report.html" in told
    assert "returned (code)" in told


def test_the_outcome_of_a_stopped_run_says_so_first(console: Console) -> None:
    report = report_of(recorded(segments=1), stopped_by="it was stopped by hand.")
    outcome.show(console, report, Path(PAGE))
    assert printed(console).strip().startswith("Incomplete: it was stopped by hand.")

"""The demo as a person runs it: real processes, the real model, and Ctrl-C before it is through."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.support.processes import is_alive
from tests.support.wait import wait_until

pytestmark = pytest.mark.lasts(70)


@pytest.fixture
def demo(tmp_path: Path, short_tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    where = ("--out", str(tmp_path / "report"), "--data", str(short_tmp_path / "data"))
    with (
        (tmp_path / "said").open("wb") as said,
        subprocess.Popen(
            [sys.executable, "-m", "updraft_cli", "demo", "--minutes", "1", *where], stdout=said, stderr=said
        ) as process,
    ):
        yield process
        process.kill()


@pytest.mark.timeout(600)
def test_ctrl_c_stops_everything_and_reports_what_was_measured(demo: subprocess.Popen[bytes], tmp_path: Path) -> None:
    said = tmp_path / "said"
    # Live requests are counted, so the first report point has been measured.
    has_traffic = re.compile(r"\w+ \(\w+\): [1-9]\d* requests")
    wait_until(lambda: bool(has_traffic.search(said.read_text())), timeout_s=240, what="live traffic")
    pointer = "Watch it live with `updraft ui --data "  # the address itself is only for a terminal
    wait_until(lambda: pointer in said.read_text(), timeout_s=60, what="the way to the live page")
    children = psutil.Process(demo.pid).children(recursive=True)
    assert len(children) >= 4

    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=200) == 0

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["is_complete"], report["stopped_by"]) == (False, "it was stopped by hand.")
    assert report["points"][0]["arms"]["adaptive"]["acceptance_length"] == 1.0  # day 0: no draft
    assert report["summary"]["failed_requests"] == 0
    assert "Incomplete: it was stopped by hand." in said.read_text()
    assert not any(is_alive(child.pid) for child in children)

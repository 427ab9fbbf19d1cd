import io
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from updraft_cli import results
from updraft_cli.results import Bar, Result


@pytest.mark.parametrize(
    ("bar", "is_met"),
    [
        pytest.param(results.at_least("gain", 25.0, 25.0), True, id="reached"),
        pytest.param(results.at_least("gain", 24.9, 25.0), False, id="below"),
        pytest.param(results.at_most("pause", 30.0, 30.0), True, id="up to"),
        pytest.param(results.at_most("pause", 30.1, 30.0), False, id="beyond"),
        pytest.param(results.above("ratio", 1.0, 1.0), False, id="equal is not above"),
        pytest.param(results.above("ratio", 1.01, 1.0), True, id="above"),
        pytest.param(results.at_least("gain", None, 25.0), False, id="not measured is not met"),
        pytest.param(results.at_most("failed", None, 0.0), False, id="not measured is not met either"),
    ],
)
def test_a_bar_is_met_or_not(bar: Bar, is_met: bool) -> None:  # noqa: FBT001 - of the table
    assert bar.met is is_met


def test_a_benchmark_fails_with_the_names_of_the_bars_that_it_missed() -> None:
    bars = [
        results.at_most("pause", 30.1, 30.0, "ms"),
        results.at_least("gain", 9.0, 1.0),
        results.above("rate", None, 1),
    ]
    assert results.missed(bars) == "missed: pause is 30.1 ms, not at most 30 ms; rate is -, not above 1"


def test_a_benchmark_that_met_its_bars_succeeds() -> None:
    assert results.missed([results.at_least("gain", 9.0, 1.0)]) is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "-"),
        (0.0, "0 ms"),
        (2.456, "2.46 ms"),
        (24.56, "24.6 ms"),
        (245.6, "246 ms"),
        (15.0, "15 ms"),
        (5.9e-7, "5.9e-07 ms"),
    ],
)
def test_a_number_has_as_many_digits_as_matter(value: float | None, told: str) -> None:
    assert results.number(value, "ms") == told


def test_this_machine_has_a_name_cores_and_memory() -> None:
    machine = results.machine()
    assert machine.processor
    assert machine.cores >= 1
    assert machine.memory_gb > 0.1


def test_a_commit_with_changes_on_top_says_so(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    assert results.commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    clean = results.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("b")
    assert results.commit(tmp_path) == f"{clean}+"


def test_a_result_is_written_whole(tmp_path: Path) -> None:
    result = Result(
        name="swap",
        command="make bench-swap",
        started=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        commit="abc",
        seed=0,
        machine=results.machine(),
        bars=(results.at_most("pause", 12.0, 30.0, "ms"),),
        samples=[{"pause_ms": 12.0}],
    )
    path = results.write(result, tmp_path / "results")
    assert path.name == "swap-20260102T030405Z.json"
    read = json.loads(path.read_text())
    assert read["bars"][0]["met"] is True
    assert read["samples"] == [{"pause_ms": 12.0}]


def test_bars_are_shown_with_their_verdict() -> None:
    out = io.StringIO()
    results.show_bars(Console(file=out, width=100), [results.at_most("pause", 31.0, 30.0, "ms")])
    assert out.getvalue().splitlines()[1].split() == ["✗", "pause", "31", "ms", "at", "most", "30", "ms"]

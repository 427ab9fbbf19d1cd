"""The parts that all benchmarks share: the entry point, its output and exit code, quartiles, and arms in turn."""

import argparse
import json
from pathlib import Path

import pytest
from bench import harness
from bench.harness import Line, Measurements
from hypothesis import given
from hypothesis import strategies as st

from updraft_cli import results

MEASUREMENTS = Measurements(
    seed=3,
    lines=(
        Line(results.at_most("pause", 12.5, 30, "ms"), harness.spread([10.0, 12.5, 15.0]), "of 3 swaps"),
        Line(results.at_least("swaps", 2, 3)),
    ),
    samples=[{"round": 0, "pause_ms": 12.5}],
    figures=["one figure more"],
)


def run(*options: str, measurements: Measurements | None = None) -> str | int | None:
    """Run a benchmark with these options; return the argument of `sys.exit`."""

    def measure(arguments: argparse.Namespace) -> Measurements:
        assert arguments.rounds == 2
        if measurements is None:
            raise KeyboardInterrupt
        return measurements

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bench", *options])
        with pytest.raises(SystemExit) as ended:
            harness.run("example", parser, measure)
    return ended.value.code


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(harness, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


def test_a_run_prints_machine_figures_and_bars(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--rounds", "2", measurements=MEASUREMENTS) == "missed: swaps is 2, not at least 3"
    printed, machine = capsys.readouterr().out, results.machine()
    assert printed.startswith("make bench-example ARGS='--rounds 2' (commit ")
    assert f"{machine.processor}, {machine.cores} cores, " in printed
    assert "one figure more" in printed
    (pause,) = (line for line in printed.splitlines() if "pause" in line)
    for cell in ("12.5 ms", "11.2 to 13.8 (3)", "at most 30 ms", "of 3 swaps"):
        assert cell in pause


def test_a_run_writes_its_samples(folder: Path) -> None:
    run("--rounds=2", measurements=MEASUREMENTS)
    (path,) = folder.iterdir()
    result = json.loads(path.read_text())
    assert (result["name"], result["command"]) == ("example", "make bench-example ARGS=--rounds=2")
    assert (result["seed"], result["samples"]) == (3, MEASUREMENTS.samples)
    assert [bar["met"] for bar in result["bars"]] == [True, False]


def test_an_interrupted_run_fails_and_writes_nothing(folder: Path) -> None:
    assert run("--rounds", "2") == "bench-example was interrupted. Nothing was written."
    assert not folder.exists()


@given(st.lists(st.floats(0.1, 10), min_size=1))
def test_quartiles_are_in_order_and_within_the_values(values: list[float]) -> None:
    quartiles = harness.spread(values)
    assert quartiles is not None
    assert min(values) <= quartiles.low <= quartiles.median <= quartiles.high <= max(values)
    assert quartiles.count == len(values)


def test_nothing_has_no_quartiles() -> None:
    assert harness.spread([]) is None


@pytest.mark.parametrize("text", ["0", "-3", "many"])
def test_an_option_that_counts_something_is_at_least_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=harness.positive)
    assert parser.parse_args(["--rounds", "2"]).rounds == 2
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds", text])
    assert "argument --rounds: " in capsys.readouterr().err


def test_each_arm_is_first_in_its_turn() -> None:
    assert [tuple(harness.in_turn("xyz", n)) for n in range(3)] == [("x", "y", "z"), ("y", "z", "x"), ("z", "x", "y")]

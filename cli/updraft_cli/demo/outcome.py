"""The result on the terminal: the numbers by arm and segment, the bars, and the path of the report."""

from pathlib import Path

from rich.console import Console

from updraft_cli import output, results
from updraft_cli.demo.plan import Arm, SegmentName
from updraft_cli.demo.report import ByArm, Report
from updraft_cli.demo.summary import drafter_remarks, headline


def show(console: Console, report: Report, page: Path) -> None:
    console.print()
    if not report.is_complete:
        console.print(f"Incomplete: {report.stopped_by}", style="bold yellow")
    console.print(headline(report), style="bold")
    console.print()
    table = output.table("at the end of a segment", *(f">{name}" for name in _segments(report)))
    for name, values, digits in (
        ("tokens per verify step", report.summary.acceptance_length, 2),
        ("tokens/s", report.summary.tokens_per_second, 1),
    ):
        for arm in Arm:
            table.add_row(f"{name}, {arm}", *(_number(values, arm, segment, digits) for segment in SegmentName))
    console.print(table)
    for remark in drafter_remarks(report):
        console.print(remark, markup=False, highlight=False)
    console.print()
    results.show_bars(console, report.bars)
    missed = [bar for bar in report.bars if not bar.met]
    if missed:
        console.print(f"{len(missed)} of {len(report.bars)} bars missed.", style="bold red")
    console.print(f"\nThe report: {page}", soft_wrap=True)


def _segments(report: Report) -> list[str]:
    domains = {part.name: part.domain for part in report.parts}
    return [f"{name} ({domains[name]})" if name in domains else name for name in SegmentName]


def _number(values: ByArm, arm: Arm, segment: SegmentName, digits: int) -> str:
    value = values[arm][segment]
    return "-" if value is None else f"{value:.{digits}f}"

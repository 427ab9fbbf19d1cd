"""The report as one HTML page that needs nothing else: charts are inline SVG, no script, nothing is fetched."""

from pathlib import Path

import jinja2

from updraft_cli.demo import charts
from updraft_cli.demo.plan import LOOKAHEAD, Arm, SegmentName
from updraft_cli.demo.report import Report
from updraft_cli.demo.summary import drafter_remarks, headline, ratio
from updraft_cli.results import number as quantity

_FOLDER = Path(__file__).parent

_FOLLOWS = frozenset({"pending", "superseded"})
"""Phases that follow from what another row says: a version was published, or another one took over."""

PAGE, PICTURE, DATA = "report.html", "report.png", "report.json"


def write(report: Report, folder: Path) -> Path:
    """Write page, picture and data into `folder`; return the page's path."""
    over_run = charts.run_chart(report)
    page = folder / PAGE
    page.write_text(render(report))
    charts.png(over_run, folder / PICTURE)
    (folder / DATA).write_text(report.model_dump_json(indent=1) + "\n")
    return page


def render(report: Report) -> str:
    loader = jinja2.FileSystemLoader(_FOLDER)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        report=report,
        headline=headline(report),
        acceptance=charts.svg(charts.run_chart(report), "acceptance"),
        speed=charts.svg(charts.speed_chart(report), "speed"),
        learning=charts.svg(charts.learning_chart(report), "learning"),
        length_s=report.parts[-1].ended_s if report.parts else 0.0,
        lookahead=LOOKAHEAD,
        domains=("code", "math"),
        domain_of=dict.fromkeys(SegmentName, "") | {part.name: part.domain for part in report.parts},
        shifted=len(report.parts) > 1,
        segments=list(SegmentName),
        arms=list(Arm),
        labels=charts.LABELS,
        remarks=remarks(report),
        decisions=[transition for transition in report.transitions if transition.phase not in _FOLLOWS],
        num_prompts=_num_prompts(report),
        number=lambda value, digits: "-" if value is None else f"{value:.{digits}f}",
        quantity=quantity,
        clock=lambda seconds: f"{int(seconds) // 60}:{int(seconds) % 60:02d}",
    )


def remarks(report: Report) -> list[str]:
    """Return the speeds in words, also where something simpler was faster."""
    ratios = {part: ratio(report, part.name, Arm.ADAPTIVE, Arm.NONE) for part in report.parts}
    texts = [f"{value:.2f} times in {part.name} ({part.domain})" for part, value in ratios.items() if value is not None]
    if not texts:
        return []
    return [f"Speed of the adaptive draft against no speculation: {', '.join(texts)}.", *drafter_remarks(report)]


def _num_prompts(report: Report) -> int:
    fixed = (arm.fixed for point in report.points for arm in point.arms.values())
    return max((measured.requests for measured in fixed if measured is not None), default=0)

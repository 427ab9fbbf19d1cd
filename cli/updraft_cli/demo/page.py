"""The report as one HTML page that needs nothing else: the console's styles, charts and drawing code, frozen with their data.

The page permits no other script and loads nothing. Without scripts, each chart has its figures as a table.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import ChoiceLoader, FileSystemLoader

from updraft_cli.demo import charts
from updraft_cli.demo.plan import LOOKAHEAD, Arm, SegmentName
from updraft_cli.demo.report import Report
from updraft_cli.demo.summary import drafter_remarks, headline, ratio
from updraft_cli.results import number as quantity
from updraft_cli.ui.site import FOLDER, environment
from updraft_cli.ui.views.charts import frozen

_FOLDER = Path(__file__).parent

_FOLLOWS = frozenset({"pending", "superseded"})
"""Phases that follow from what another row says: a version was published, or another one took over."""

PAGE, DATA = "report.html", "report.json"

_STYLES = ("vendor/uPlot.min.css", "console.css", "pages.css")
_LIBRARY = "vendor/uPlot.iife.min.js"
_THEME = """
if (typeof uPlot !== "undefined") for (const table of document.querySelectorAll("figure details")) table.open = false;
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
"""


def write(report: Report, folder: Path) -> Path:
    """Write page and data into `folder`; return the page's path."""
    page = folder / PAGE
    page.write_text(render(report))
    (folder / DATA).write_text(report.model_dump_json(indent=1) + "\n")
    return page


def render(report: Report) -> str:
    templates = environment()
    templates.loader = ChoiceLoader([FileSystemLoader(_FOLDER), FileSystemLoader(FOLDER / "templates")])
    library, module = _static(_LIBRARY), _static("charts.js") + _THEME
    return templates.get_template("page.html").render(
        report=report,
        styles="\n".join(map(_static, _STYLES)),
        library=library,
        module=module,
        digests=[_digest(library), _digest(module)],
        headline=headline(report),
        run=frozen("arms", charts.elapsed(charts.arms(report), report)),
        speed=frozen("live-speed", charts.elapsed(charts.live_speed(report), report)),
        console=[frozen(name, charts.elapsed(content, report)) for name, content in report.charts.items()],
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
    )


def _static(name: str) -> str:
    """Return a file of the console's; one that was built without npm lacks the libraries, and the page has tables only."""
    path = FOLDER / "static" / name
    return path.read_text() if path.exists() else ""


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


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

"""The chart's dashboard of the fleet with the numbers of a run: Prometheus answers its queries, the console's code draws them.

Grafana cannot be had here (ADR 0086). So this shows the panels and their numbers, and not how Grafana draws them.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import ChoiceLoader, DictLoader, FileSystemLoader
from tests.chart.chart import CHART
from tests.chart.dashboards import chosen
from tests.chart.prometheus.server import PrometheusServer

from updraft_cli.ui.site import FOLDER, environment
from updraft_cli.ui.views.charts import ChartTable, frozen
from updraft_cli.ui.views.parts import Figure

_STEP_S = 10

_UNITS = {
    "short": "",
    "s": "seconds",
    "reqps": "requests per second",
    "percentunit": "ratio",
    "Bps": "bytes per second",
    "bytes": "bytes",
}
"""Names of Grafana's units."""

_PAGE = """{% import "macros.html" as parts %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Updraft / Fleet</title>
<style>
{% for style in styles %}{{ style|safe }}{% endfor %}
body > .top, body > main { width: auto; margin-inline: var(--margin); }
.charts { grid-template-columns: repeat(4, 1fr); }
</style>
</head>
<body>
<header class="top"><span class="brand">Updraft</span><span class="where">A dashboard, drawn without Grafana</span></header>
<main>
<h1>Updraft / Fleet</h1>
<p class="headline">The panels of the dashboard, with the answers of a Prometheus to their queries: a tiny model serves, learns
and tries drafts in canaries for some minutes.</p>
{{ parts.figures(now) }}
{% for title, charts in rows %}
<h2>{{ title }}</h2>
<section class="charts" aria-label="{{ title }}">{% for view in charts %}{{ parts.chart("", view) }}{% endfor %}</section>
{% endfor %}
<p class="quiet">{{ empty|length }} panels have no numbers in this run: {{ empty|join(", ") }}.</p>
</main>
{% for script in scripts %}<script type="module">{{ script|safe }}</script>{% endfor %}
</body>
</html>
"""

_DRAW = """
for (const table of document.querySelectorAll("figure details")) table.remove();
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
"""


def page(prometheus: PrometheusServer, since_s: float) -> str:
    """Return the dashboard as one HTML page; `since_s` is the start of the run, in seconds since 1970."""
    now: list[Figure] = []
    rows: list[tuple[str, list[ChartTable]]] = []
    empty = []
    for panel in json.loads((CHART / "files" / "dashboards" / "fleet.json").read_text())["panels"]:
        if panel["type"] == "row":
            rows.append((panel["title"], []))
        elif not (content := _content(prometheus, panel, since_s))["series"]:
            empty.append(panel["title"])
        elif panel["type"] == "stat":
            now.append(Figure(title=panel["title"], value=f"{content['series'][0]['values'][-1]:.3g}"))
        else:
            rows[-1][1].append(frozen(panel["title"], content))
    templates = environment()
    templates.loader = ChoiceLoader([DictLoader({"page.html": _PAGE}), FileSystemLoader(FOLDER / "templates")])
    static = FOLDER / "static"
    return templates.get_template("page.html").render(
        now=now,
        rows=[(title, charts) for title, charts in rows if charts],
        empty=empty,
        styles=[(static / name).read_text() for name in ("vendor/uPlot.min.css", "console.css", "pages.css")],
        scripts=[
            f"{(static / 'vendor/uPlot.iife.min.js').read_text()}\nwindow.uPlot = uPlot;",
            f"{(static / 'charts.js').read_text()}{_DRAW}",
        ],
    )


def _content(prometheus: PrometheusServer, panel: Mapping[str, Any], since_s: float) -> dict[str, Any]:
    """Return a panel as a chart of the console: all series of its queries at the same times."""
    lines = [
        (_label(target["legendFormat"], labels), points)
        for target in panel["targets"]
        for labels, points in prometheus.series(chosen(target["expr"]), since_s=since_s, step_s=_STEP_S)
    ]
    times = sorted({at for _, points in lines for at in points})
    return {
        "title": panel["title"],
        "unit": _UNITS[panel["fieldConfig"]["defaults"]["unit"]],
        "zero": False,
        "start": None,
        "elapsed": True,
        "times": [at - since_s for at in times],
        "series": [{"label": label, "values": [points.get(at) for at in times]} for label, points in lines],
        "bands": [],
        "marks": [],
    }


def _label(legend: str, labels: Mapping[str, str]) -> str:
    """Fill a legend of Grafana's in: `{{role}} of {{speculator}}`."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda name: labels.get(name[1], ""), legend)

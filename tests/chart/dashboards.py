"""The chart's dashboards, and their queries as Grafana sends them."""

import json
import re
from collections.abc import Callable, Collection
from contextlib import suppress

from tests.chart.chart import CHART
from tests.chart.prometheus.server import PrometheusServer
from tests.support.wait import LONG_S, wait_until

VARIABLES = {"$__rate_interval": "20s", "$namespace": ".*", "$speculator": ".*"}
"""Values for "All" of everything. The interval is long enough for four scrapes, as Grafana's."""


def queries(dashboard: str) -> list[tuple[str, str]]:
    """Title and query of each panel of `fleet` or `operator`."""
    content = json.loads((CHART / "files" / "dashboards" / f"{dashboard}.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in content["panels"] for target in panel.get("targets", ())]
    return [(title, chosen(expression)) for title, expression in found]


def metrics(dashboard: str) -> set[str]:
    """Names of all metrics that its queries ask for."""
    return {name for _, query in queries(dashboard) for name in re.findall(r"\bupdraft_\w+", query)}


def empty_queries(
    prometheus: PrometheusServer,
    dashboard: str,
    since_s: float,
    *,
    absent: Collection[str],
    meanwhile: Callable[[], None] = lambda: None,
    timeout_s: float = LONG_S,
) -> list[tuple[str, str]]:
    """Queries that give no number since then (seconds since 1970), with their panels; none as soon as all gave some.

    Queries of `absent` metrics are left out. `meanwhile` is called between two looks.
    """
    empty = [(title, query) for title, query in queries(dashboard) if not any(name in query for name in absent)]

    def are_filled() -> bool:
        meanwhile()
        empty[:] = [(title, query) for title, query in empty if not prometheus.values(query, since_s=since_s)]
        return empty == []

    with suppress(TimeoutError):
        wait_until(are_filled, timeout_s=timeout_s)
    return empty


def chosen(expression: str) -> str:
    """Return a query of a panel with values for the dashboard's variables."""
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression

"""Every query of the operator's dashboard gives numbers of an operator that works on a real API server."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chart.dashboards import empty_queries, metrics
from tests.chart.go_program import PROMETHEUS
from tests.chart.prometheus.server import PrometheusServer, Target
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names

ABSENT = {
    "updraft_operator_reconcile_errors_total": "no reconcile fails",
    "updraft_operator_serving_startup_seconds_bucket": "no pod becomes ready, because one query asks for what is not",
    "updraft_operator_stale_objects_total": "no watch misses a change",
}
"""Metrics without a number in this run, and why."""


@pytest.fixture
def prometheus(operator: Running, home: str, tmp_path: Path) -> Iterator[PrometheusServer]:
    if not PROMETHEUS.binary.exists():
        pytest.skip("Prometheus: not built; run `python -m tests.chart.go_program` (once; 3 minutes)")
    labels = {"namespace": home, "pod": "updraft-operator-0"}
    target = Target(url=f"http://127.0.0.1:{operator.process.port}/metrics", job="updraft-operator", labels=labels)
    with PrometheusServer(tmp_path, [target]) as server:
        yield server


def test_every_query_of_the_operators_dashboard_gives_numbers_of_a_run(
    prometheus: PrometheusServer, subject: Subject
) -> None:
    since_s = time.time()
    # A counter's rate needs a scrape from before it grew.
    wait_until(lambda: prometheus.values("updraft_operator_leader == 1", since_s=since_s) != [], what="a first scrape")
    subject.create()
    subject.wait_until_built()
    subject.api.patch(subject.path("Service"), {"spec": {"selector": {names.COMPONENT: "elsewhere"}}})

    assert empty_queries(prometheus, "operator", since_s, absent=ABSENT) == []


def test_every_metric_that_may_be_absent_is_on_the_operators_dashboard() -> None:
    assert ABSENT.keys() <= metrics("operator")

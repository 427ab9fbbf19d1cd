"""Every query of the fleet's dashboard gives numbers of a real run: real processes, and a real Prometheus.

The operator's dashboard is held to an operator on a real API server in tests/cluster/operator.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chart.dashboards import empty_queries, metrics
from tests.chart.fleet_run import Run, fleet_run
from tests.chart.go_program import PROMETHEUS

pytestmark = [pytest.mark.timeout(600), pytest.mark.lasts(120)]

ABSENT = {
    "updraft_trainer_flops_utilization_ratio": "the trainer has no GPU whose peak is known",
    "updraft_trainer_gpu_memory_bytes": "the trainer has no GPU",
    "updraft_registry_denied_calls_total": "the registry asks for no tokens",
    "updraft_registry_refused_uploads_total": "the trainer uploads nothing that is refused",
}
"""Metrics without a number in this run, and why."""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    if not PROMETHEUS.binary.exists():
        pytest.skip("Prometheus: not built; run `python -m tests.chart.go_program` (once; 3 minutes)")
    with fleet_run(tmp_path) as running:
        yield running


def test_every_query_of_the_fleets_dashboard_gives_numbers_of_a_run(run: Run) -> None:
    run.send_nonsense()

    empty = empty_queries(run.prometheus, "fleet", run.since_s, absent=ABSENT, meanwhile=run.send, timeout_s=400)

    assert empty == []


def test_every_metric_that_may_be_absent_is_on_the_fleets_dashboard() -> None:
    assert ABSENT.keys() <= metrics("fleet")

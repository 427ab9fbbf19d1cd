"""A Prometheus that scrapes processes of this machine, with the labels that the chart's monitors give to pods."""

import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.chart.go_program import PROMETHEUS
from tests.support.ports import free_port
from tests.support.processes import ServerProcess
from tests.support.wait import LONG_S, wait_until

SCRAPE_S = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A process to scrape: the URL of its metrics, and the labels that a monitor adds."""

    url: str
    job: str
    labels: Mapping[str, str]


class PrometheusServer(ServerProcess):
    """Data and log stay in `folder`."""

    def __init__(self, folder: Path, targets: Sequence[Target]) -> None:
        super().__init__()
        self._folder = folder
        self._targets = targets
        self._port = free_port()

    def start(self) -> None:
        config = self._folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(self._configuration()))
        with (self._folder / "prometheus.log").open("wb") as log:
            self._spawn(
                [
                    PROMETHEUS.binary,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self._is_ready, what="a ready Prometheus")
        except BaseException:
            self.kill()
            raise

    def values(self, expression: str, *, since_s: float) -> list[float]:
        """The numbers of all series of an expression from then (seconds since 1970) until now."""
        found = self.series(expression, since_s=since_s, step_s=SCRAPE_S)
        return [value for _, points in found for value in points.values()]

    def series(
        self, expression: str, *, since_s: float, step_s: float
    ) -> list[tuple[dict[str, str], dict[float, float]]]:
        """The labels of each series of an expression, and its numbers by time in seconds since 1970; NaN is no number."""
        query = {"query": expression, "start": str(since_s), "end": str(time.time()), "step": str(step_s)}
        answer = self._get("/api/v1/query_range", query).raise_for_status().json()
        found = []
        for series in answer["data"]["result"]:
            points = {at: float(value) for at, value in series["values"] if value != "NaN"}
            if points:
                found.append((series["metric"], points))
        return found

    def num_up(self) -> int:
        """Targets whose last scrape succeeded."""
        answer = self._get("/api/v1/targets").raise_for_status().json()
        return sum(target["health"] == "up" for target in answer["data"]["activeTargets"])

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self._port}{path}", params=query, timeout=LONG_S, trust_env=False)

    def _configuration(self) -> dict[str, Any]:
        jobs = [
            {
                "job_name": target.job,
                "honor_labels": True,
                "metrics_path": urllib.parse.urlsplit(target.url).path,
                "static_configs": [
                    {"targets": [urllib.parse.urlsplit(target.url).netloc], "labels": dict(target.labels)}
                ],
            }
            for target in self._targets
        ]
        return {"global": {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}, "scrape_configs": jobs}

    def _is_ready(self) -> bool:
        if not self.is_running:
            raise ChildProcessError(f"Prometheus has ended: {(self._folder / 'prometheus.log').read_text()[-2000:]}")
        try:
            return self._get("/-/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

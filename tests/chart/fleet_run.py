"""A speculator with a tiny target that learns, tries canaries and serves on this machine, and a Prometheus that scrapes it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx
from tests.chart.prometheus.server import PrometheusServer, Target
from tests.support.ports import preferred_ports_taken
from tests.support.tiny_target import make_tiny_target
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.trainer import FAST
from tests.support.wait import LONG_S, wait_until

from updraft_cli.local.plan import StackConfig
from updraft_cli.local.stack import Stack

SETTINGS = {
    "UPDRAFT_INFERENCE_DTYPE": "float32",
    "UPDRAFT_INFERENCE_MAX_CONTEXT": "256",
    "UPDRAFT_INFERENCE_CAPTURE_EVALUATION_FRACTION": "0.3",
    "UPDRAFT_REGISTRY_ANALYSIS_INTERVAL_SECONDS": "2",
    "UPDRAFT_REGISTRY_ANALYSIS_MIN_SAMPLES": "10",
    "UPDRAFT_REGISTRY_ANALYSIS_ON_INCONCLUSIVE": "Promote",
    "UPDRAFT_REGISTRY_PROGRESS_DEADLINE_SECONDS": "30",
    "UPDRAFT_REGISTRY_ROLLOUT_STEPS": "100:0",
    "UPDRAFT_REGISTRY_SETTLE_SECONDS": "0",
    **FAST,
}
"""A draft in seconds, and a canary that ends within half a minute."""


@dataclass(frozen=True, slots=True)
class Run:
    """A speculator that runs, and a Prometheus that scrapes it."""

    prometheus: PrometheusServer
    since_s: float
    client: httpx.Client
    model: str
    numbers: Iterator[int] = field(default_factory=count)

    def send(self) -> None:
        """One of six requests, so that a draft learns them by heart."""
        number = next(self.numbers)
        body = {
            "model": self.model,
            "prompt": f"prompt {number % 6}",
            "max_tokens": 40,
            "temperature": 0,
            "ignore_eos": True,
            "updraft": {"drafter": "eagle3", "lookahead": 3, "domain": "code"},
        }
        headers = {"X-Updraft-Capture": "off"} if number % 10 == 9 else {}
        self.client.post("/v1/completions", json=body, headers=headers).raise_for_status()

    def send_nonsense(self) -> None:
        """A request that is refused."""
        answer = self.client.post("/v1/completions", json={"model": self.model, "prompt": "x", "max_tokens": -1})
        assert answer.status_code == httpx.codes.BAD_REQUEST


@contextmanager
def fleet_run(folder: Path) -> Iterator[Run]:
    """One without a draft yet."""
    config = StackConfig(
        model=write_tokenizer(make_tiny_target(folder / "tiny", seed=1)),
        data=folder / "data",
        port=0,
        registry_port=0,
        threads=1,
        trainer_threads=1,
        strategy="Canary",
        settings=SETTINGS,
    )
    with ExitStack() as running:
        with preferred_ports_taken():
            stack = running.enter_context(Stack(config))
        targets = [
            Target(
                url=url,
                job=f"updraft-{part}",
                labels={"namespace": "team", "speculator": "default", "pod": f"default-{part}-0"},
            )
            for part, url in stack.addresses.metrics_urls.items()
        ]
        (folder / "prometheus").mkdir()
        prometheus = running.enter_context(PrometheusServer(folder / "prometheus", targets))
        wait_until(lambda: prometheus.num_up() == len(targets), what="targets that answer")
        client = running.enter_context(httpx.Client(base_url=stack.addresses.inference_url, timeout=LONG_S))
        model = client.get("/v1/models").json()["data"][0]["id"]
        yield Run(prometheus, time.time(), client, model)

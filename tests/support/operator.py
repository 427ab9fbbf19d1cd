"""The operator as its own process against a control plane, and access to its HTTP endpoints."""

import urllib.error
import urllib.request
from pathlib import Path

from tests.support.ports import free_port
from tests.support.processes import Process, scrape
from tests.support.wait import LONG_S, wait_until

_HTTP_S = 5.0


class OperatorProcess(Process):
    """`python -m updraft_operator` with the kubeconfig's identity; `settings` by field name."""

    def __init__(self, kubeconfig: Path, log: Path, **settings: object) -> None:
        self.port = free_port()
        chosen = {
            "metrics_port": self.port,
            "log_format": "text",
            "redis_url": "redis://redis.invalid:6379/0",
            "resync_seconds": 5,
            **settings,
        }
        variables = {f"UPDRAFT_OPERATOR_{name.upper()}": str(value) for name, value in chosen.items()}
        proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        super().__init__("updraft_operator", {"KUBECONFIG": str(kubeconfig), **proxies, **variables}, log)

    def status(self, path: str) -> int:
        """The HTTP status of /healthz or /readyz; 0 while nothing answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=_HTTP_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return 0

    def metric(self, sample: str) -> float:
        """One sample with its labels, such as `updraft_operator_leader`; 0 if there is none."""
        return scrape(self.port).get(sample, 0.0)

    @property
    def is_leader(self) -> bool:
        """Whether its leader metric is 1."""
        return self.metric("updraft_operator_leader") == 1.0

    def wait_until_ready(self, *, timeout_s: float = LONG_S) -> None:
        """Return once it has listed everything; fail at once if it exited."""

        def is_ready() -> bool:
            assert self.is_running, f"the operator exited:\n{self.log()[-3000:]}"
            return self.status("/readyz") == 200

        wait_until(is_ready, timeout_s=timeout_s, what="a ready operator")

"""One operator for all tests of a module, with the chart's rights, and a speculator for each test."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.cluster.access import Api
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import crds
from tests.cluster.operator import requests
from tests.cluster.operator.accounts import Account, account
from tests.cluster.operator.registries import Shelf
from tests.cluster.operator.subject import Subject
from tests.support.operator import OperatorProcess
from tests.support.redis_server import RedisServer
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

__all__ = ["crds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An operator that runs, and who it is."""

    cluster: ControlPlane
    account: Account
    process: OperatorProcess

    def wait_for_listings(self, number: int) -> None:
        """Return once it has listed everything so many times more."""
        since = requests.now()
        wait_until(
            lambda: requests.num_listings(self.cluster, self.account.user, since) >= number,
            what=f"{number} listings of everything",
        )


@pytest.fixture(autouse=True)
def _both_kinds(kubernetes: ControlPlane, crds: None) -> None:
    if not kubernetes.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS has no kube-controller-manager: no pod is made, no garbage is collected")


@pytest.fixture(scope="module")
def home(kubernetes: ControlPlane, crds: None) -> Iterator[str]:
    """A namespace of the operator's own."""
    name = f"updraft-{secrets.token_hex(4)}"
    with kubernetes.api() as api:
        api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        yield name
        api.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    """More settings of the module's operator."""
    return {}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryProcess]:
    """One for a module, if its `settings` name it: it keeps speculators apart by name."""
    with RegistryProcess(tmp_path_factory.mktemp("registry"), settle_seconds=0) as process:
        yield process


@pytest.fixture(scope="module")
def operator(
    kubernetes: ControlPlane,
    home: str,
    redis_server: RedisServer,
    settings: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """The operator of a module, for the whole cluster; nothing that it asked for may have been forbidden."""
    folder = tmp_path_factory.mktemp("operator")
    with kubernetes.api() as api:
        who = account(kubernetes, api, folder, home, "operator")
    chosen = {"namespace": home, "identity": "only", "redis_url": redis_server.url, **settings}
    with OperatorProcess(who.kubeconfig, folder / "operator.log", **chosen) as process:
        process.wait_until_ready()
        yield Running(cluster=kubernetes, account=who, process=process)
        assert process.is_running, process.log()[-3000:]
        assert process.terminate() == 0
    assert requests.denied(kubernetes, who.user) == []


@pytest.fixture
def subject(api: Api, namespace: str) -> Subject:
    """A speculator that is not there yet, with a name of its own."""
    return Subject(api, namespace, f"asp-{secrets.token_hex(3)}")


@pytest.fixture
def shelf(registry: RegistryProcess, subject: Subject) -> Shelf:
    return Shelf(registry, subject.name)

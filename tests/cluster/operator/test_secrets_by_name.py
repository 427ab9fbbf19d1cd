"""An operator whose roles name Secrets, as the chart makes them with `rbac.secrets`, on a real API server."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from tests.chart.chart import NAMESPACE, Document, of_kind, one, rendered
from tests.cluster.access import Api, ApiError, Json
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator import requests
from tests.cluster.operator.accounts import Account, account
from tests.cluster.operator.subject import Subject
from tests.support.operator import OperatorProcess
from tests.support.redis_server import RedisServer
from tests.support.wait import wait_until

from updraft_operator.manifests.tls.terms import TlsMode

_NAMES = "rbac.secrets.byName=true,rbac.secrets.ofSpeculators={listed},rbac.secrets.named={clients}"
_CHART = ("default", "--set", _NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByName:
    """An operator that runs, and who it is."""

    cluster: ControlPlane
    account: Account
    process: OperatorProcess


def _at_home() -> Iterator[Json]:
    """Rules of the chart's Roles in the operator's own namespace, about Secrets."""
    for role in of_kind(rendered(*_CHART), "Role"):
        if role["metadata"].get("namespace", NAMESPACE) == NAMESPACE and "operator" in role["metadata"]["name"]:
            yield from (rule for rule in role["rules"] if rule["resources"] == ["secrets"])


@pytest.fixture(scope="module", autouse=True)
def operator(
    kubernetes: ControlPlane, home: str, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ByName]:
    folder = tmp_path_factory.mktemp("operator")
    role: Document = one(rendered(*_CHART), "ClusterRole", "updraft-system-updraft")
    with kubernetes.api() as api:
        rights = {"allowed": role["rules"], "at_home": [*_at_home()]}
        who = account(kubernetes, api, folder, home, "by-name", **rights)
        for name in ("updraft-ca", "updraft-operator-redis-key"):  # empty, as the chart makes them
            api.create(f"/api/v1/namespaces/{home}/secrets", {"metadata": {"name": name}})
    settings = {
        "namespace": home,
        "identity": "only",
        "redis_url": redis_server.url,
        "redis_key_secret": "updraft-operator-redis-key",
        "tls_mode": TlsMode.SELF_SIGNED,
    }
    with OperatorProcess(who.kubeconfig, folder / "operator.log", **settings) as process:
        process.wait_until_ready()
        yield ByName(cluster=kubernetes, account=who, process=process)
        assert process.is_running, process.log()[-3000:]


def _secrets(namespace: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/secrets" + (f"/{name}" if name else "")


def test_a_listed_resource_gets_all_its_secrets_and_nothing_was_refused(
    operator: ByName, api: Api, namespace: str
) -> None:
    listed = Subject(api, namespace, "listed")
    listed.create(serving={"apiKeysSecretRef": {"name": "clients", "key": "keys"}})
    assert "clients" in listed.wait_for("Accepted", "False", "SecretNotFound"), "it may look for those that specs name"
    body = {"metadata": {"name": "clients"}, "stringData": {"keys": "a-key-of-sixteen-characters"}}
    api.create(_secrets(namespace), body)
    listed.wait_until_built()
    shared = ("redis-writer", "redis-reader", "registry-tls")
    wait_until(lambda: all(listed.exists("Secret", f"listed-{end}") for end in shared), what="its Secrets")
    listed.change(traces={"redis": {"mode": "Dedicated"}})
    dedicated = ("dedicated-writer", "dedicated-reader", "redis-tls")
    wait_until(
        lambda: all(listed.exists("Secret", f"listed-{end}") for end in dedicated), what="those of its own Redis"
    )
    assert [each for each in requests.denied(operator.cluster, operator.account.user) if namespace in each] == []


def test_a_resource_that_is_not_listed_gets_none_and_the_operator_says_which_is_refused(
    operator: ByName, api: Api, namespace: str
) -> None:
    other = Subject(api, namespace, "other")
    other.create()
    refusal = re.compile(r'secrets \\*"other-')
    wait_until(lambda: refusal.search(operator.process.log()) is not None, what="the refusal in the log")
    assert not other.exists("Deployment", "other-serving")


@pytest.mark.attack(
    boundary="operator",
    attack="an operator whose role names Secrets (`rbac.secrets`) that was taken over: other Secrets by get, apply and create",
    outcome="Forbidden; a listed name can be applied",
)
def test_the_account_reaches_no_secret_that_is_not_named(operator: ByName, namespace: str) -> None:
    with Api(operator.account.kubeconfig) as client:
        named = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "listed-redis-tls"}}
        applied = client.apply(_secrets(namespace, "listed-redis-tls"), named, manager="test")
        assert applied["metadata"]["name"] == "listed-redis-tls"
        other = {**named, "metadata": {"name": "somebodys"}}
        calls: dict[str, Callable[[], object]] = {
            "get": lambda: client.get(_secrets(namespace, "somebodys")),
            "list": lambda: client.get(_secrets(namespace)),
            "apply": lambda: client.apply(_secrets(namespace, "somebodys"), other, manager="test"),
            "create": lambda: client.create(_secrets(namespace), named),
        }
        for name, call in calls.items():
            with pytest.raises(ApiError) as refused:
                call()
            assert refused.value.code == 403, name

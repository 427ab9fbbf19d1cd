"""Requests for certificates, on an API server that serves the published definition of cert-manager, without its controllers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import install_with
from tests.cluster.fixtures import own_control_plane
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names
from updraft_operator.manifests.tls.terms import TlsMode
from updraft_operator.watching.cluster import CERTIFICATE

_DEFINITION = Path(__file__).with_name("certificates.yaml")


@pytest.fixture(scope="module")
def kubernetes() -> Iterator[ControlPlane]:
    """A cluster of its own, because an operator looks at its start which kinds are served."""
    with own_control_plane() as running:
        yield running


@pytest.fixture(scope="module")
def crds(kubernetes: ControlPlane) -> None:
    with kubernetes.api() as api:
        install_with(api, _DEFINITION, f"/apis/{names.CERT_MANAGER_API_VERSION}/namespaces/default/certificates")


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    return {"tls_mode": TlsMode.CERT_MANAGER, "tls_issuer_name": "corporate"}


def test_a_registry_gets_a_request_that_the_api_server_takes_and_the_operator_repairs(
    operator: Running, subject: Subject
) -> None:
    subject.create()
    subject.wait_until_built()
    name = f"{subject.name}-registry-tls"
    wait_until(lambda: subject.exists(CERTIFICATE, name), what="the request")
    request = subject.get(CERTIFICATE, name)["spec"]
    assert request["secretName"] == name
    assert request["dnsNames"] == [f"{subject.name}-registry.{subject.namespace}.svc"]
    assert request["issuerRef"] == {"name": "corporate", "kind": "ClusterIssuer", "group": "cert-manager.io"}

    subject.api.patch(subject.path(CERTIFICATE, name), {"spec": {"secretName": "another"}})
    wait_until(lambda: subject.get(CERTIFICATE, name)["spec"]["secretName"] == name, what="the repair")
    assert requests.denied(operator.cluster, operator.account.user) == []

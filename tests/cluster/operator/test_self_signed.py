"""The operator's own CA on a real API server: certificates and CAs are renewed every few seconds, and no pod restarts."""

import base64

import pytest
from tests.cluster.access import Json
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.manifests.tls.terms import TlsMode
from updraft_operator.watching.cluster import RESOURCES
from updraft_operator.watching.x509 import read_certificate

_CA = "updraft-ca"


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    lives = {"tls_ca_seconds": 60, "tls_certificate_seconds": 15}
    return {"tls_mode": TlsMode.SELF_SIGNED, "resync_seconds": 5.0, **lives}


def _entries(secret: Json) -> dict[str, str]:
    return {entry: base64.b64decode(value).decode() for entry, value in secret["data"].items()}


def test_certificates_and_cas_are_renewed_and_no_template_changes(
    operator: Running, subject: Subject, home: str
) -> None:
    subject.create()
    subject.wait_until_built()
    name = f"{subject.name}-registry-tls"
    wait_until(lambda: subject.exists("ConfigMap", f"{subject.name}-ca"), what="the CAs")
    wait_until(lambda: subject.exists("Secret", name), what="the certificate")
    secret = subject.get("Secret", name)
    first = _entries(secret)
    facts = read_certificate(first["tls.crt"], first["tls.key"], first["ca.crt"])
    assert facts is not None
    assert (secret["type"], facts.is_signed) == ("kubernetes.io/tls", True)
    assert facts.names == {f"{subject.name}-registry.{subject.namespace}.svc"}
    built = _generations(subject)

    wait_until(lambda: _entries(subject.get("Secret", name))["tls.crt"] != first["tls.crt"], what="another certificate")
    wait_until(lambda: _num_trusted(subject) == 2, what="another CA beside the first")
    own = subject.api.get(RESOURCES["Secret"].path(home, _CA))
    assert _entries(own)["ca.crt"].count("BEGIN CERTIFICATE") == 2
    assert _generations(subject) == built

    subject.api.delete(subject.path("Secret", name))
    wait_until(lambda: subject.exists("Secret", name), what="the certificate again")
    assert requests.denied(operator.cluster, operator.account.user) == []


def _num_trusted(subject: Subject) -> int:
    return str(subject.get("ConfigMap", f"{subject.name}-ca")["data"]["ca.crt"]).count("BEGIN CERTIFICATE")


def _generations(subject: Subject) -> dict[tuple[str, str], int]:
    """They grow with every change of a spec."""
    kinds = ("Deployment", "StatefulSet")
    return {where: each["metadata"]["generation"] for where, each in subject.objects().items() if where[0] in kinds}

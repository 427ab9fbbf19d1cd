"""Certificates that the real controllers of cert-manager issue: the operator uses them, and follows when they are renewed."""

import base64
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from tests.chart.go_program import CERT_MANAGER
from tests.cluster.access import Api, ApiError, Json
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import DEFINITIONS, install_with
from tests.cluster.daemon import Daemon
from tests.cluster.fixtures import own_control_plane
from tests.cluster.operator import requests
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.own_registries import own_registry
from tests.cluster.operator.subject import Subject
from tests.support.mounts import Mount
from tests.support.ports import free_port
from tests.support.wait import wait_until

from updraft_operator.api import names
from updraft_operator.manifests.tls.terms import TlsMode
from updraft_operator.watching.cluster import CERTIFICATE
from updraft_operator.watching.x509 import read_certificate

_HERE = Path(__file__).parent
_CERTIFICATES = _HERE / "certificates.yaml"
_OTHERS = _HERE.parent / "certmanager" / "issuers.yaml"
_API = f"/apis/{names.CERT_MANAGER_API_VERSION}"
_ISSUER = "corporate"
_HOME = "cert-manager"
"""The namespace with the Secrets of ClusterIssuers."""


@pytest.fixture(scope="module")
def kubernetes() -> Iterator[ControlPlane]:
    """A cluster of its own, because an operator looks at its start which kinds are served."""
    if not CERT_MANAGER.binary.exists():
        pytest.skip("cert-manager: not built; run `python -m tests.chart.go_program` (once; 2 minutes)")
    with own_control_plane() as running:
        yield running


@pytest.fixture(scope="module")
def crds(kubernetes: ControlPlane) -> None:
    with kubernetes.api() as api:
        install_with(api, _CERTIFICATES, f"{_API}/namespaces/default/certificates")
        for definition in yaml.safe_load_all(_OTHERS.read_text()):
            api.create(DEFINITIONS, definition)
        for plural in ("namespaces/default/certificaterequests", "namespaces/default/issuers", "clusterissuers"):
            wait_until(lambda path=f"{_API}/{plural}": answers(api, path), what=f"an answer about {plural}")  # type: ignore[misc] # a default


def answers(api: Api, path: str) -> bool:
    with suppress(ApiError):
        api.get(path)
        return True
    return False


@pytest.fixture(scope="module", autouse=True)
def cert_manager(kubernetes: ControlPlane, crds: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """It runs, with an issuer whose CA a certificate of its own is."""
    with kubernetes.api() as api:
        api.create("/api/v1/namespaces", {"metadata": {"name": _HOME}})
        controllers = Daemon(
            "certmanager",
            [CERT_MANAGER.binary, kubernetes.kubeconfig, _HOME],
            tmp_path_factory.mktemp("certmanager"),
        )
        try:
            _make_issuer(api)
            controllers.wait_until(lambda: is_ready(api, f"{_API}/clusterissuers/{_ISSUER}"), what="the issuer")
            yield controllers
            assert controllers.process.poll() is None, controllers.tail()
        finally:
            controllers.kill()


def _make_issuer(api: Api) -> None:
    make(api, "ClusterIssuer", "root", {"selfSigned": {}})
    authority = {
        "isCA": True,
        "commonName": "a CA of the test",
        "secretName": "root-ca",
        "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
        "issuerRef": {"name": "root", "kind": "ClusterIssuer"},
    }
    make(api, "Certificate", "root-ca", authority, where=f"/namespaces/{_HOME}")
    make(api, "ClusterIssuer", _ISSUER, {"ca": {"secretName": "root-ca"}})


def make(api: Api, kind: str, name: str, spec: Json, *, where: str = "") -> None:
    content = {"apiVersion": names.CERT_MANAGER_API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}
    api.create(f"{_API}{where}/{kind.lower()}s", content)


def is_ready(api: Api, path: str) -> bool:
    conditions = api.get(path).get("status", {}).get("conditions", ())
    return any((each["type"], each["status"]) == ("Ready", "True") for each in conditions)


def renew(api: Api, path: str) -> None:
    """As `cmctl renew` does."""
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    certificate = api.get(path)
    issuing = {
        "type": "Issuing",
        "status": "True",
        "reason": "ManuallyTriggered",
        "message": "by a test",
        "lastTransitionTime": now,
        "observedGeneration": certificate["metadata"]["generation"],
    }
    others = [each for each in certificate["status"]["conditions"] if each["type"] != "Issuing"]
    api.patch(f"{path}/status", {"status": {"conditions": [*others, issuing]}})


@pytest.fixture(scope="module")
def port() -> int:
    """The port of the registry, which the operator must know before."""
    return free_port()


@pytest.fixture(scope="module")
def settings(port: int) -> dict[str, object]:
    return {
        "tls_mode": TlsMode.CERT_MANAGER,
        "tls_issuer_name": _ISSUER,
        "registry_address": f"127.0.0.1:{port}",
        "resync_seconds": 5.0,
    }


class Pod:
    """The registry's certificate and its clients' CAs in files, as kubelets keep them."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self._subject = subject
        self.server = Mount(folder / "server")
        self.sync()

    def sync(self) -> None:
        held = entries(self._subject.get("Secret", f"{self._subject.name}-registry-tls"))
        self.server.sync({entry: held[entry] for entry in ("tls.crt", "tls.key")})


def entries(secret: Json) -> dict[str, str]:
    return {entry: base64.b64decode(value).decode() for entry, value in secret["data"].items()}


def shown(subject: Subject) -> dict[str, str]:
    """What is in the registry's Secret; empty without one."""
    found = subject.find("Secret", f"{subject.name}-registry-tls")
    return {} if found is None else entries(found)


def test_a_registry_gets_its_certificate_and_the_operator_follows_its_renewal_and_another_ca(
    operator: Running, subject: Subject, port: int, tmp_path: Path
) -> None:
    subject.create()
    subject.wait_until_built()
    name = f"{subject.name}-registry-tls"
    wait_until(lambda: "tls.crt" in shown(subject), what="a certificate from cert-manager")
    first = shown(subject)
    facts = read_certificate(first["tls.crt"], first["tls.key"], first["ca.crt"])
    assert facts is not None
    assert facts.is_signed
    assert facts.names == {f"{subject.name}-registry.{subject.namespace}.svc"}
    wait_until(lambda: trusted(subject) == first["ca.crt"], what="its CA for clients")

    pod = Pod(subject, tmp_path)
    (tmp_path / "registry").mkdir()
    files = {"tls_cert_file": pod.server.folder / "tls.crt", "tls_key_file": pod.server.folder / "tls.key"}
    with own_registry(operator.cluster, subject, port, tmp_path / "registry", **files) as registry:
        subject.wait_for("RegistryReady", "True", "Connected")
        built = generations(subject)

        renew(subject.api, subject.path(CERTIFICATE, name))
        wait_until(lambda: shown(subject).get("tls.crt") not in (None, first["tls.crt"]), what="a renewed certificate")
        second = shown(subject)
        assert second["ca.crt"] == first["ca.crt"]
        pod.sync()

        renew(subject.api, f"{_API}/namespaces/{_HOME}/certificates/root-ca")
        wait_until(lambda: root(subject.api) != first["ca.crt"], what="another CA")
        renew(subject.api, subject.path(CERTIFICATE, name))
        wait_until(lambda: shown(subject)["ca.crt"] == root(subject.api), what="a certificate of the other CA")
        pod.sync()
        wait_until(lambda: trusted(subject) == shown(subject)["ca.crt"], what="the other CA for clients")
        registry.kill()
        wait_until(lambda: subject.condition("RegistryReady")[0] == "False", what="a lost connection")
        registry.start()
        subject.wait_for("RegistryReady", "True", "Connected")
        assert generations(subject) == built
    assert requests.denied(operator.cluster, operator.account.user) == []


def trusted(subject: Subject) -> str:
    """What clients of the registry trust."""
    found = subject.find("ConfigMap", f"{subject.name}-ca")
    return str(found["data"]["ca.crt"]) if found is not None else ""


def root(api: Api) -> str:
    return entries(api.get(f"/api/v1/namespaces/{_HOME}/secrets/root-ca"))["tls.crt"]


def generations(subject: Subject) -> dict[tuple[str, str], int]:
    """They grow with every change of a spec."""
    kinds = ("Deployment", "StatefulSet")
    return {where: each["metadata"]["generation"] for where, each in subject.objects().items() if where[0] in kinds}

"""etcd, kube-apiserver and kube-controller-manager as plain processes, in a folder of their own; no root needed.

The real API server with RBAC and the audit log on. What needs a node (a pod that runs) is in `cluster`, which starts
these same three.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.cluster import identities, programs
from tests.cluster.access import Api, ApiError, kubectl
from tests.cluster.daemon import Daemon
from tests.support.ports import free_port

_CONFIG = Path(__file__).parent / "config"
LOOPBACK = "127.0.0.1"
DOMAIN = "cluster.local"
ISSUER = "https://kubernetes.default.svc"
"""Issuer of ServiceAccount tokens."""

API_SERVICE = "10.96.0.1"
SERVICES = "10.96.0.0/16"
PODS = "10.244.0.0/16"
_CONTROLLERS = "kube-controller-manager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the servers listen; by default on free ports of the loopback interface."""

    host: str
    api: int
    etcd: int
    etcd_peer: int

    @classmethod
    def free(cls) -> "Addresses":
        return cls(host=LOOPBACK, api=free_port(), etcd=free_port(), etcd_peer=free_port())


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """A control plane that runs."""

    folder: Path
    has_controllers: bool
    """False when KUBEBUILDER_ASSETS was used and holds no controller manager: then nothing is garbage-collected."""

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return identities.kubeconfig(self.folder / "identities", "admin")

    @property
    def audit_log(self) -> Path:
        """For `access.audited`."""
        return self.folder / "audit.log"

    def api(self, *, user: str = "", groups: tuple[str, ...] = ()) -> Api:
        """Return a client as the administrator, or as whom is named; the caller closes it."""
        return Api(self.kubeconfig, user=user, groups=groups)

    def kubectl(self, *words: str, stdin: str | None = None) -> str:
        """Run kubectl as the administrator."""
        return kubectl(self.kubeconfig, *words, stdin=stdin)


@contextmanager
def control_plane(*, has_controllers: bool = True) -> Iterator[ControlPlane]:
    """A control plane of one's own in a temporary folder; nothing of it is left afterwards.

    Without `has_controllers` nobody makes pods of Deployments or collects garbage.
    """
    with tempfile.TemporaryDirectory(prefix="updraft-") as name, ExitStack() as running:
        addresses, folder = Addresses.free(), Path(name)
        identities.write(folder / "identities", server=f"https://{LOOPBACK}:{addresses.api}", hosts=[LOOPBACK])
        names = set()
        for daemon in start(folder, addresses, has_controllers=has_controllers):
            running.callback(daemon.kill)
            names.add(daemon.name)
        yield ControlPlane(folder=folder, has_controllers=_CONTROLLERS in names)


def start(folder: Path, addresses: Addresses, *, has_controllers: bool = True) -> Iterator[Daemon]:
    """Start the processes, each once it can work; `folder/identities` is there. Yields each before it is waited for."""
    (folder / "logs").mkdir(exist_ok=True)
    yield _etcd(folder, addresses)
    api_server = _api_server(folder, addresses)
    yield api_server
    with Api(identities.kubeconfig(folder / "identities", "admin")) as api:
        api_server.wait_until(lambda: _is_ready(api), what="a ready API server")
    if has_controllers and programs.find(_CONTROLLERS) is not None:
        yield _controllers(folder)


def _is_ready(api: Api) -> bool:
    try:
        return api.text("/readyz") == "ok" and api.exists("/api/v1/namespaces/default")
    except (ApiError, httpx.TransportError):
        return False


def _etcd(folder: Path, addresses: Addresses) -> Daemon:
    clients, peers = (f"http://{LOOPBACK}:{port}" for port in (addresses.etcd, addresses.etcd_peer))
    command: list[str | Path] = [
        programs.path("etcd"),
        f"--data-dir={folder / 'etcd'}",
        "--unsafe-no-fsync",  # nothing here outlives its processes
        *(f"--listen-client-urls={clients}", f"--advertise-client-urls={clients}"),
        *(f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}"),
        f"--initial-cluster=default={peers}",
    ]
    return Daemon("etcd", command, folder / "logs")


def _api_server(folder: Path, addresses: Addresses) -> Daemon:
    known = folder / "identities"
    is_alone = addresses.host == LOOPBACK
    command: list[str | Path] = [
        programs.path("kube-apiserver"),
        f"--etcd-servers=http://{LOOPBACK}:{addresses.etcd}",
        *(f"--bind-address={LOOPBACK if is_alone else '0.0.0.0'}", f"--secure-port={addresses.api}"),  # noqa: S104 - of its own network
        f"--advertise-address={addresses.host}",
        # A loopback address is no endpoint for pods, and there are none.
        f"--endpoint-reconciler-type={'none' if is_alone else 'lease'}",
        *(f"--tls-cert-file={known / 'apiserver.pem'}", f"--tls-private-key-file={known / 'apiserver.pem'}"),
        *(f"--client-ca-file={known / 'ca.crt'}", f"--token-auth-file={known / 'tokens.csv'}"),
        f"--kubelet-client-certificate={known / 'kubelet-client.pem'}",
        f"--kubelet-client-key={known / 'kubelet-client.pem'}",
        "--kubelet-preferred-address-types=InternalIP",
        *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={known / 'service-accounts.key'}",
        f"--service-account-signing-key-file={known / 'service-accounts.key'}",
        f"--service-cluster-ip-range={SERVICES}",
        "--allow-privileged=true",
        *(f"--audit-policy-file={_CONFIG / 'audit.yaml'}", f"--audit-log-path={folder / 'audit.log'}"),
        "--audit-log-maxsize=4000",  # MB: in one file for as long as any test runs
        "--profiling=false",
    ]
    return Daemon("kube-apiserver", command, folder / "logs")


def _controllers(folder: Path) -> Daemon:
    known = folder / "identities"
    config = identities.kubeconfig(known, "system:kube-controller-manager")
    command: list[str | Path] = [
        programs.path(_CONTROLLERS),
        *(f"--kubeconfig={config}", "--secure-port=0"),
        f"--root-ca-file={known / 'ca.crt'}",
        f"--service-account-private-key-file={known / 'service-accounts.key'}",
        "--use-service-account-credentials=true",
        *(f"--cluster-signing-cert-file={known / 'ca.crt'}", f"--cluster-signing-key-file={known / 'ca.key'}"),
        *("--allocate-node-cidrs=true", f"--cluster-cidr={PODS}", f"--service-cluster-ip-range={SERVICES}"),
        *("--leader-elect=false", "--profiling=false"),
    ]
    return Daemon(_CONTROLLERS, command, folder / "logs")

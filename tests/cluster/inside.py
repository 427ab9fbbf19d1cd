"""The first process inside the cluster's own namespaces: sets them up, starts the programs, reaps the dead.

What the programs write to fixed places only these namespaces see, and the network has no way out. So the end of this
process, which ends all others of its process namespace, is the end of everything: there is no clean-up code.
"""

import os
import shutil
import socket
import sys
import urllib.request
from pathlib import Path

from tests.cluster import containerd, control_plane, identities, private, programs, relay
from tests.cluster.access import Api
from tests.cluster.control_plane import LOOPBACK, Addresses
from tests.cluster.daemon import Daemon
from tests.cluster.private import FOLDER

NODE_ADDRESS = "10.199.0.1"
_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_CONFIG = Path(__file__).parent / "config"
# The kubelet insists on these, which belong to the whole machine: it is shown files of its own in their place.
_SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}


def main() -> None:
    """`inside STATE LISTENER CGROUP`: the cluster's folder, a socket's descriptor, the node's cgroup."""
    state, listener, cgroup = Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])), sys.argv[3]
    _files(state)
    _network()
    os.environ["TMPDIR"] = str(FOLDER / "tmp")
    os.environ["PATH"] = f"{programs.binaries()}:{os.environ['PATH']}"
    port = listener.getsockname()[1]
    addresses = Addresses(host=NODE_ADDRESS, api=port, etcd=2379, etcd_peer=2380)
    daemons = [_containerd(), *control_plane.start(FOLDER, addresses)]
    daemons += [_kubelet(cgroup), _proxy(), _scheduler(), _dns()]
    relay.start(listener, LOOPBACK, port)
    (FOLDER / "ready").touch()
    _reap({daemon.process.pid: daemon.name for daemon in daemons})


def _files(state: Path) -> None:
    private.mount(state)
    for name, value in _SYSCTLS.items():
        private.show(Path("/proc/sys") / name, f"{value}\n")
    # Nobody answers there: an image that is not loaded fails at once, not after minutes of time-outs.
    Path("/etc/resolv.conf").unlink(missing_ok=True)
    Path("/etc/resolv.conf").write_text(f"nameserver {LOOPBACK}\n")
    (FOLDER / "resolv.conf").touch()  # what pods inherit: they resolve names of the cluster only
    (FOLDER / "tmp").mkdir()
    (FOLDER / "logs").mkdir()


def _network() -> None:
    """The node's address on one end of a cable that leads nowhere (a dummy device is not in every kernel)."""
    socket.sethostname(identities.NODE)
    for line in (
        "link set lo up",
        "link add node0 type veth peer name node0-end",
        f"addr add {NODE_ADDRESS}/32 dev node0",
        "link set node0 up",
        "link set node0-end up",
        # Service addresses must have a route before they are rewritten to a pod's.
        f"route add default dev node0 src {NODE_ADDRESS}",
    ):
        private.run("ip", *line.split())
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _scheduler() -> Daemon:
    config = identities.kubeconfig(FOLDER / "identities", "system:kube-scheduler")
    command: list[str | Path] = [
        programs.path("kube-scheduler"),
        f"--kubeconfig={config}",
        "--secure-port=0",
        "--leader-elect=false",
    ]
    return Daemon("kube-scheduler", command, FOLDER / "logs")


def _dns() -> Daemon:
    """CoreDNS on the node itself rather than in a pod: one image, one Service and one roll-out less to wait for."""
    rules = [
        {"apiGroups": [""], "resources": ["namespaces", "pods", "services"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    binding = {
        "metadata": {"name": "coredns"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "coredns"},
        "subjects": [{"kind": "User", "name": "coredns"}],
    }
    with Api(identities.kubeconfig(FOLDER / "identities", "admin")) as api:
        api.create(f"{_RBAC}/clusterroles", {"metadata": {"name": "coredns"}, "rules": rules})
        api.create(f"{_RBAC}/clusterrolebindings", binding)
    daemon = Daemon("coredns", [programs.path("coredns"), "-conf", _CONFIG / "Corefile"], FOLDER / "logs")
    daemon.wait_until(_dns_is_ready, what="CoreDNS's first listing of services")
    return daemon


def _dns_is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:8181/ready", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _containerd() -> Daemon:
    folder = Path("/etc/cni/net.d")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_CONFIG / "cni.conflist", folder / "00-updraft.conflist")
    daemon = containerd.start(FOLDER / "logs")
    containerd.load(FOLDER / "pause.tar")
    return daemon


def _kubelet(cgroup: str) -> Daemon:
    config = identities.kubeconfig(FOLDER / "identities", f"system:node:{identities.NODE}")
    command: list[str | Path] = [
        programs.path("kubelet"),
        *(f"--config={_CONFIG / 'kubelet.yaml'}", f"--kubeconfig={config}", f"--cgroup-root=/{cgroup}"),
        *(f"--hostname-override={identities.NODE}", f"--node-ip={NODE_ADDRESS}"),
        *(f"--root-dir={FOLDER / 'kubelet'}", f"--cert-dir={FOLDER / 'kubelet-identities'}"),
    ]
    return Daemon("kubelet", command, FOLDER / "logs")


def _proxy() -> Daemon:
    command: list[str | Path] = [programs.path("kube-proxy"), f"--config={_CONFIG / 'kube-proxy.yaml'}"]
    return Daemon("kube-proxy", command, FOLDER / "logs")


def _reap(names: dict[int, str]) -> None:
    """Wait for children for ever, our own and those that containers orphaned; tell of our own."""
    while True:
        pid, status = os.wait()
        if pid in names:
            sys.stderr.write(f"{names[pid]} ended with {os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    main()

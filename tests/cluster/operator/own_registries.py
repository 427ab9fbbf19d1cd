"""The registry of a speculator with the settings that the operator gave it, and callers with tokens of the real API server.

A kubelet requests the tokens of pods from the API server; here tests do, for the same account, audience and pod.
"""

import base64
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc.aio
import yaml
from tests.cluster.access import Json
from tests.cluster.control_plane import ControlPlane
from tests.cluster.operator.subject import Subject
from tests.support.ports import free_port
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

from updraft_chassis import rpc
from updraft_chassis.credentials import Credentials
from updraft_operator.api import names

_PREFIX = "UPDRAFT_REGISTRY_"


@contextmanager
def own_registry(
    cluster: ControlPlane, subject: Subject, port: int, folder: Path, **files: Path
) -> Iterator[RegistryProcess]:
    """It has its own pod's token for the API server; only addresses and paths are of here, such as those of `files`."""
    content = subject.get("ConfigMap", f"{subject.name}-registry")["data"]
    given = {name.removeprefix(_PREFIX).lower(): value for name, value in content.items()}
    server = yaml.safe_load(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
    (folder / "ca.crt").write_bytes(base64.b64decode(server["certificate-authority-data"]))
    (folder / "token").write_text(token(subject, names.REGISTRY))
    given |= {
        "host": "127.0.0.1",
        "port": port,
        "metrics_port": free_port(),
        "data_dir": folder / "registry",
        "key_set": given["key_set"].replace("https://kubernetes.default.svc", server["server"]),
        "key_set_token_file": folder / "token",
        "key_set_ca_file": folder / "ca.crt",
        **files,
    }
    process = RegistryProcess(folder, settle_seconds=0, **given)
    process.port, process.metrics_port = port, given["metrics_port"]
    with process:
        subject.run(names.REGISTRY)
        yield process


def pod_of(subject: Subject, part: str) -> Json:
    wait_until(lambda: bool(subject.pods(part)), what=f"a pod of {part}")
    return subject.pods(part)[0]


def token(subject: Subject, part: str) -> str:
    """The only token in a pod of the part, requested as its volume says."""
    pod = pod_of(subject, part)
    sources = [source for volume in pod["spec"]["volumes"] for source in volume.get("projected", {}).get("sources", ())]
    (wanted,) = (source["serviceAccountToken"] for source in sources if "serviceAccountToken" in source)
    bound = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    spec = {"expirationSeconds": wanted["expirationSeconds"], "boundObjectRef": bound}
    if "audience" in wanted:
        spec["audiences"] = [wanted["audience"]]
    path = subject.path("ServiceAccount", pod["spec"]["serviceAccountName"], "token")
    return str(subject.api.create(path, {"spec": spec})["status"]["token"])


@asynccontextmanager
async def bearing(registry: RegistryProcess, value: str) -> AsyncIterator[grpc.aio.Channel]:
    file = registry.folder / "callers-token"
    file.write_text(value)
    async with rpc.channel(registry.address, Credentials(token_file=file)) as channel:
        yield channel

"""Pods that the real scheduler finds no place for: their resource names what they wait for, by the scheduler's own words."""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.cluster import identities, programs
from tests.cluster.control_plane import ControlPlane
from tests.cluster.daemon import Daemon
from tests.cluster.operator.conftest import Running
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

_CLASS = "gpus.example.com"
_DRA = "/apis/resource.k8s.io/v1"
_SIZE = {"cpu": "64", "memory": "256Gi", "pods": "110"}

GPU = {"accelerator": {"resourceName": "nvidia.com/gpu"}}
SLICE = {"accelerator": {"resourceName": "nvidia.com/mig-1g.10gb"}}
CLAIM = {"resources": {"claims": [{"name": "gpus"}]}}
_CLAIMS, _ABSENT, _NAMED = (
    {"resourceClaims": [{"name": "gpus", **source}]}
    for source in (
        {"resourceClaimTemplateName": "one"},
        {"resourceClaimTemplateName": "none"},
        {"resourceClaimName": "mine"},
    )
)


@pytest.fixture(scope="module")
def scheduler(kubernetes: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its name, for pods that ask for it: those of other tests get no node. There is one, without any device."""
    if programs.find("kube-scheduler") is None:
        pytest.skip("kube-scheduler: not built; run `make cluster-build`")
    folder, name = tmp_path_factory.mktemp("scheduler"), f"real-{secrets.token_hex(3)}"
    with kubernetes.api() as api, ExitStack() as ending:
        api.create("/api/v1/nodes", {"metadata": {"name": name}})
        ending.callback(api.delete, f"/api/v1/nodes/{name}")
        api.patch(f"/api/v1/nodes/{name}/status", {"status": {"capacity": _SIZE, "allocatable": _SIZE}})
        api.create(f"{_DRA}/deviceclasses", {"metadata": {"name": _CLASS}, "spec": {}})
        ending.callback(api.delete, f"{_DRA}/deviceclasses/{_CLASS}")
        daemon = _started(kubernetes, folder, name)
        ending.callback(daemon.kill)
        yield name


def _started(kubernetes: ControlPlane, folder: Path, name: str) -> Daemon:
    known = identities.kubeconfig(kubernetes.folder / "identities", "system:kube-scheduler")
    content = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "clientConnection": {"kubeconfig": str(known)},
        "leaderElection": {"leaderElect": False},
        "profiles": [{"schedulerName": name}],
    }
    (folder / "config.yaml").write_text(json.dumps(content))
    command: list[str | Path] = [
        programs.path("kube-scheduler"),
        f"--config={folder / 'config.yaml'}",
        "--secure-port=0",
    ]
    return Daemon("kube-scheduler", command, folder)


@pytest.mark.parametrize(
    ("serving", "pod", "reason", "words"),
    [
        pytest.param(GPU, {}, "InsufficientGPU", "Insufficient nvidia.com/gpu", id="GPU"),
        pytest.param(SLICE, {}, "InsufficientGPU", "Insufficient nvidia.com/mig-1g.10gb", id="MIG slice"),
        pytest.param(CLAIM, _CLAIMS, "ClaimNotAllocated", "cannot allocate all claims", id="claim"),
        pytest.param(CLAIM, _ABSENT, "ClaimNotAllocated", "ResourceClaimTemplate none", id="claim of no template"),
        pytest.param(CLAIM, _NAMED, "ClaimNotAllocated", "ResourceClaim mine", id="claim that does not exist"),
        pytest.param({}, {"nodeSelector": {"a": "b"}}, "Unschedulable", "node affinity/selector", id="topology"),
    ],
)
def test_a_pod_without_a_place_names_what_it_waits_for(
    operator: Running,
    subject: Subject,
    scheduler: str,
    serving: Mapping[str, Any],
    pod: Mapping[str, Any],
    *,
    reason: str,
    words: str,
) -> None:
    request = {"name": "gpu", "exactly": {"deviceClassName": _CLASS}}
    template = {"metadata": {"name": "one"}, "spec": {"spec": {"devices": {"requests": [request]}}}}
    subject.api.create(f"{_DRA}/namespaces/{subject.namespace}/resourceclaimtemplates", template)
    # Without a kubelet, the node has a taint.
    spec = {"schedulerName": scheduler, "tolerations": [{"operator": "Exists"}], **pod}
    subject.create(engine={"type": "VLLM"}, serving={**serving, "podTemplate": {"spec": spec}})

    def is_told() -> bool:
        told = subject.conditions().get("Available", {})
        return told.get("reason") == reason and words in told["message"]

    wait_until(is_told, what=f"{reason} with {words!r}")  # a claim is first not made, and then not allocated

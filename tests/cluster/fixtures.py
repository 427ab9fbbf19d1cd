"""The two clusters as fixtures, one of each for a whole session; tests keep apart by namespaces of their own."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.cluster import programs
from tests.cluster.access import Api
from tests.cluster.cluster import Cluster, cluster, obstacle
from tests.cluster.control_plane import ControlPlane, control_plane

_CONTROL_PLANE = ("etcd", "kube-apiserver", "kubectl")


@pytest.fixture(scope="session")
def kubernetes() -> Iterator[ControlPlane]:
    """A control plane without a node: the real API server, its controllers, no pod ever runs."""
    _skip_unless_built(*_CONTROL_PLANE)
    with control_plane() as running:
        yield running


@pytest.fixture(scope="session")
def node() -> Iterator[Cluster]:
    """A whole cluster with one node."""
    if why := obstacle():
        pytest.skip(why)
    _skip_unless_built(*(name for module in programs.MODULES for name in module.packages))
    with cluster() as running:
        yield running


@pytest.fixture
def api(kubernetes: ControlPlane) -> Iterator[Api]:
    """The administrator's client of the control plane."""
    with kubernetes.api() as client:
        yield client


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    """An empty namespace of the control plane."""
    name = f"test-{secrets.token_hex(4)}"
    api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    api.delete(f"/api/v1/namespaces/{name}")


@contextmanager
def own_control_plane(*programs_too: str) -> Iterator[ControlPlane]:
    """A new one, for a module that changes what is everyone's. Skips if it, or one of these other programs, was not built."""
    _skip_unless_built(*_CONTROL_PLANE, *programs_too)
    with control_plane() as running:
        yield running


def _skip_unless_built(*names: str) -> None:
    if missing := [name for name in names if programs.find(name) is None]:
        pytest.skip(f"{', '.join(missing)}: not built; run `make cluster-build` or set KUBEBUILDER_ASSETS")

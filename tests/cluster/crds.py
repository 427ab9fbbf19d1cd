"""Our kinds on a control plane, for every test that needs them."""

from pathlib import Path

import pytest
import yaml
from tests.cluster.access import Api, succeeds
from tests.cluster.control_plane import ControlPlane
from tests.support.wait import wait_until

from updraft_operator.api import crd, names

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def install(api: Api) -> None:
    """Store the definitions, and return when all kinds answer; twice is as good as once."""
    for definition in crd.definitions():
        api.apply(f"{DEFINITIONS}/{definition['metadata']['name']}", definition, manager="tests")
    for plural in (names.SPECULATORS, names.DRAFT_VERSIONS, names.DRAFT_IMPORTS):
        path = f"/apis/{names.API_VERSION}/namespaces/default/{plural}"
        wait_until(lambda path=path: succeeds(lambda: api.get(path)), what=f"an answer about {plural}")  # type: ignore[misc] # a default


def install_with(api: Api, definition: Path, collection_path: str) -> None:
    """Ours, and the kind of another project by its published definition."""
    install(api)
    api.create(DEFINITIONS, yaml.safe_load(definition.read_text()))
    wait_until(lambda: succeeds(lambda: api.get(collection_path)), what=f"an answer about {collection_path}")


def collection(namespace: str, plural: str) -> str:
    """The path of the resources of one of our kinds."""
    return f"/apis/{names.API_VERSION}/namespaces/{namespace}/{plural}"


@pytest.fixture(scope="session")
def crds(kubernetes: ControlPlane) -> None:
    """Our kinds on the session's control plane."""
    with kubernetes.api() as api:
        install(api)

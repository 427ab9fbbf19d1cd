"""The operator's port to the cluster: a few verbs, and the kinds that they apply to."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest


class Resource(NamedTuple):
    prefix: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        parts = [self.prefix, *(["namespaces", namespace] if namespace else []), self.plural, name, subresource]
        return "/".join(part for part in parts if part)

    @property
    def group(self) -> str:
        """Empty for the core group."""
        _, _, rest = self.prefix.partition("/apis/")
        return rest.partition("/")[0]

    @property
    def version(self) -> str:
        return self.prefix.rpartition("/")[2]


_UPDRAFT = f"/apis/{names.API_VERSION}"

LEADER_WORKER_SET, CERTIFICATE = "LeaderWorkerSet", "Certificate"

KINDS: Mapping[str, Resource] = {
    "AdaptiveSpeculator": Resource(_UPDRAFT, names.SPECULATORS),
    "DraftVersion": Resource(_UPDRAFT, names.DRAFT_VERSIONS),
    "DraftImport": Resource(_UPDRAFT, names.DRAFT_IMPORTS),
    "Deployment": Resource("/apis/apps/v1", "deployments"),
    "StatefulSet": Resource("/apis/apps/v1", "statefulsets"),
    "Service": Resource("/api/v1", "services"),
    "ConfigMap": Resource("/api/v1", "configmaps"),
    "ServiceAccount": Resource("/api/v1", "serviceaccounts"),
    "PersistentVolumeClaim": Resource("/api/v1", "persistentvolumeclaims"),
    "PodDisruptionBudget": Resource("/apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": Resource("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Job": Resource("/apis/batch/v1", "jobs"),
    "Pod": Resource("/api/v1", "pods"),
    LEADER_WORKER_SET: Resource(f"/apis/{names.LWS_API_VERSION}", "leaderworkersets"),
    CERTIFICATE: Resource(f"/apis/{names.CERT_MANAGER_API_VERSION}", "certificates"),
}
"""Kinds that are watched. Secrets are not, because that would require permission to list them."""

RESOURCES: Mapping[str, Resource] = {
    **KINDS,
    "Secret": Resource("/api/v1", "secrets"),
    "Event": Resource("/api/v1", "events"),
    "Namespace": Resource("/api/v1", "namespaces"),
    "Lease": Resource("/apis/coordination.k8s.io/v1", "leases"),
}

OURS = ("AdaptiveSpeculator", "DraftVersion", "DraftImport")
"""Kinds of our own API, watched whoever made the object."""

OPTIONAL = (LEADER_WORKER_SET, CERTIFICATE)
"""Kinds that are watched only if the cluster serves them when the operator starts, Certificates only if it requests some."""

CHILDREN = tuple(kind for kind in KINDS if kind not in (*OURS, "Pod", *OPTIONAL))


class Cluster(Protocol):
    """Raises UpdraftErrors: NotFound, Conflict, InvalidInput (refused by a schema), Forbidden, Unavailable."""

    async def get(self, kind: str, namespace: str, name: str) -> Manifest: ...

    async def apply(self, content: Manifest, *, is_status: bool = False) -> Manifest:
        """Forced server-side apply. Returns the resulting object."""
        ...

    async def merge(self, kind: str, namespace: str, name: str, patch: Mapping[str, Any]) -> Manifest: ...

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Delete the object with this UID; if it does not exist, or another one has its name by now, that is done."""
        ...

    async def create(self, content: Manifest) -> Manifest:
        """Conflict if it already exists."""
        ...

    async def replace(self, content: Manifest) -> Manifest:
        """Conflict if it changed since it was read."""
        ...

    async def metadata(self, kind: str, namespace: str) -> list[Manifest]:
        """Metadata of all objects of a kind that the operator manages; "" for all namespaces."""
        ...

    async def pods(self, namespace: str, selector: str) -> list[Manifest]:
        """All pods of a namespace with these labels, whoever manages them, as the API server's cache has them."""
        ...

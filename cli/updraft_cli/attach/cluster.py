"""Reads from a cluster what an attachment needs: the operator's description, and the workload."""

from updraft_chassis.errors import InvalidInput, NotFound, Unavailable
from updraft_cli.attach.workload import SUFFIX, Addition, Json
from updraft_cli.backends.cluster_client import ClusterClient

_APIS = {
    "deployment": ("apps", "v1", "deployments", "Deployment"),
    "statefulset": ("apps", "v1", "statefulsets", "StatefulSet"),
    "leaderworkerset": ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets", "LeaderWorkerSet"),
}
_SHORT = {"deploy": "deployment", "sts": "statefulset", "lws": "leaderworkerset"}


def addition(client: ClusterClient, name: str) -> Addition:
    """The operator's description. Raises InvalidInput if the AdaptiveSpeculator runs its own pods."""
    speculator = client.speculator(name)
    if speculator["spec"].get("serving", {}).get("mode") != "Attached":
        raise InvalidInput(
            f"AdaptiveSpeculator {name} runs its own pods: set spec.serving.mode to Attached in another one"
        )
    try:
        return Addition.of(client.config_map(f"{name}{SUFFIX}"))
    except NotFound as error:
        problem = f"the operator has not written ConfigMap {name}{SUFFIX} yet"
        raise Unavailable(f"{problem}; `kubectl updraft explain {name}` says what it waits for") from error


def workload(client: ClusterClient, reference: str) -> Json:
    """The workload that TYPE/NAME refers to, as kubectl writes it."""
    kind, _, name = reference.lower().partition("/")
    kind = _SHORT.get(kind, kind)
    known = next((title for title in _APIS if kind in (title, f"{title}s")), "")
    if not known or not name:
        raise InvalidInput(f"{reference} is not TYPE/NAME of a workload; TYPE is one of {', '.join(_APIS)}")
    group, version, plural, title = _APIS[known]
    found = client.object(group, version, plural, name)
    return {"apiVersion": f"{group}/{version}", "kind": title, **{part: found[part] for part in ("metadata", "spec")}}

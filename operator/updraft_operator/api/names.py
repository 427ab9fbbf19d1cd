"""Names of objects, labels and annotations."""

GROUP = "updraft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
SPECULATORS = "adaptivespeculators"
DRAFT_VERSIONS = "draftversions"

MANAGER = "updraft-operator"
"""Field manager of every apply, and the value of the managed-by label."""

MANAGED_BY = "app.kubernetes.io/managed-by"
COMPONENT = "app.kubernetes.io/component"
SPECULATOR = f"{GROUP}/speculator"
APPLIED = f"{GROUP}/applied"
"""Annotation: a hash of the manifest that the operator applied last, so that dropped fields are removed too."""
SETTINGS = f"{GROUP}/settings"
"""Annotation of a pod template: a hash of its ConfigMap, so that a change of settings restarts the pods."""
ATTACH = f"{GROUP}/attach"
"""Label of pods of other workloads that Updraft is attached to, with the speculator's name."""
ROTATE = f"{GROUP}/rotate"
"""Annotation of a resource: a request for new passwords, such as the time at which it was made. Each text is done once."""
FINALIZER = f"{GROUP}/external-data"

LWS_GROUP = "leaderworkerset.x-k8s.io"
LWS_API_VERSION = f"{LWS_GROUP}/v1"
"""The API of LeaderWorkerSets, which clusters may lack."""

CERT_MANAGER_API_VERSION = "cert-manager.io/v1"

SERVING, TRAINER, REGISTRY, IMPORT, REDIS = "serving", "trainer", "registry", "import", "redis"
"""Parts of a speculator: values of the component label, and ends of names."""

METRICS = "metrics"
"""The certificate for metrics of trainers and agents."""


def child(speculator: str, part: str) -> str:
    return f"{speculator}-{part}"


def claim(pod: str) -> str:
    """The claim of a pod of a StatefulSet, as Kubernetes names it."""
    return f"data-{pod}"


def selector(speculator: str, part: str) -> dict[str, str]:
    """Labels that select the pods of a part. They never change."""
    return {SPECULATOR: speculator, COMPONENT: part}


def labels(speculator: str, part: str) -> dict[str, str]:
    return {
        **selector(speculator, part),
        MANAGED_BY: MANAGER,
        "app.kubernetes.io/name": "updraft",
        "app.kubernetes.io/instance": speculator,
    }


def draft_version(speculator: str, number: int) -> str:
    return f"{speculator}-v{number}"

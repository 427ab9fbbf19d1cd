"""Names of objects, labels and annotations."""

GROUP = "updraft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
SPECULATORS = "adaptivespeculators"
DRAFT_VERSIONS = "draftversions"
DRAFT_IMPORTS = "draftimports"

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
RUNTIME = f"{GROUP}/runtime"
"""Annotation of a workload: the runtime that made its pod template."""
RENDERED = f"{GROUP}/rendered"
"""Annotation of a workload: its template and settings as they were made, and from what, for an operator that keeps them."""
TURN = f"{GROUP}/turn"
"""Annotation of a workload: when it got another runtime in its turn, and how it was then."""
UPGRADE = f"{GROUP}/upgrade"
"""Annotation of a resource: the runtime that its pods are to get now, whatever its policy says."""
SKIP_UPGRADE = f"{GROUP}/skip-upgrade"
"""Annotation of a resource: the runtime whose failure here does not stop the updates of other resources."""
REQUESTS = (ROTATE, UPGRADE, SKIP_UPGRADE)
"""Annotations of a resource that the operator reads."""
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

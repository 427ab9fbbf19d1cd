"""Names that objects, labels and people share."""

GROUP = "updraft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
SPECULATORS = "adaptivespeculators"
DRAFT_VERSIONS = "draftversions"

MANAGER = "updraft-operator"
"""Field manager of all that is applied, and the value of the managed-by label."""

MANAGED_BY = "app.kubernetes.io/managed-by"
COMPONENT = "app.kubernetes.io/component"
SPECULATOR = f"{GROUP}/speculator"
APPLIED = f"{GROUP}/applied"
"""Annotation: a hash of what the operator applied last, so that what is no longer wished is taken away too."""
SETTINGS = f"{GROUP}/settings"
"""Annotation of a pod template: a hash of its ConfigMap, so that other settings restart the pods."""
FINALIZER = f"{GROUP}/external-data"

SERVING, TRAINER, REGISTRY, IMPORT = "serving", "trainer", "registry", "import"
"""Parts of a speculator: values of the component label, and ends of names."""


def child(speculator: str, part: str) -> str:
    """Name of an object of a part."""
    return f"{speculator}-{part}"


def selector(speculator: str, part: str) -> dict[str, str]:
    """Labels that find the pods of a part; they never change."""
    return {SPECULATOR: speculator, COMPONENT: part}


def labels(speculator: str, part: str) -> dict[str, str]:
    """Labels of an object of a part."""
    return {
        **selector(speculator, part),
        MANAGED_BY: MANAGER,
        "app.kubernetes.io/name": "updraft",
        "app.kubernetes.io/instance": speculator,
    }


def draft_version(speculator: str, number: int) -> str:
    """Name of the object of a version."""
    return f"{speculator}-v{number}"

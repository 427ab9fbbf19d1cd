"""PersistentVolumeClaims."""

from typing import Any

from updraft_operator.api.speculator import Storage


def claim_spec(storage: Storage) -> dict[str, Any]:

    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": storage.size}},
    }
    if storage.storage_class_name is not None:
        spec["storageClassName"] = storage.storage_class_name
    return spec

"""Whether an object still matches its manifest: every field of the manifest must match; other fields are ignored.

API defaults, autoscalers and sidecar injectors therefore cause no writes, but a manual change of a managed field does.
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.merge import is_key_of
from updraft_operator.planning.objects import Child

_KEYS = ("uid", "name", "containerPort", "mountPath", "port", "topologyKey", "key", "ip")
_TRUE_BY_DEFAULT = ("automountServiceAccountToken", "allowPrivilegeEscalation")
"""Fields whose absence does not mean False."""


def is_current(desired: Manifest, child: Child) -> bool:
    """Whether applying the manifest, which carries its hash, would change nothing."""
    annotations = desired["metadata"]["annotations"]
    if child.applied != annotations[names.APPLIED] or child.rendered != annotations.get(names.RENDERED, ""):
        return False
    return difference(desired, child.live()) == ""


def difference(desired: Manifest, live: Mapping[str, Any]) -> str:
    """The path of the first desired field that differs from the live object; empty if there is none."""
    content = {name: value for name, value in desired.items() if name not in ("apiVersion", "kind", "metadata")}
    path = next(_differences(content, live, ""), "")
    if path:
        return path
    ours = {name: desired["metadata"].get(name) for name in ("labels", "ownerReferences")}
    return next(_differences(ours, live.get("metadata", {}), "metadata"), "")


def _differences(desired: Any, live: Any, path: str) -> Iterator[str]:
    is_nothing = desired is None or desired in ({}, [])
    if is_nothing or (not desired and live is None and not path.endswith(_TRUE_BY_DEFAULT)):
        return  # {}, [] and absence mean the same to the API
    if isinstance(desired, dict):
        if not isinstance(live, Mapping):
            yield path
        else:
            for name, value in desired.items():
                yield from _differences(value, live.get(name), f"{path}.{name}".lstrip("."))
    elif isinstance(desired, list):
        yield from _lists(desired, live, path)
    elif desired != live and not _is_same_amount(desired, live):
        yield path


def _lists(desired: list[Any], live: Any, path: str) -> Iterator[str]:
    if not isinstance(live, list):
        yield path
        return
    key = next((key for key in _KEYS if is_key_of(key, desired)), None)
    if key is None:
        if len(desired) != len(live):
            yield path
        for number, (ours, theirs) in enumerate(zip(desired, live, strict=False)):
            yield from _differences(ours, theirs, f"{path}[{number}]")
        return
    by_key = {entry[key]: entry for entry in live if isinstance(entry, dict) and isinstance(entry.get(key), str | int)}
    for ours in desired:
        yield from _differences(ours, by_key.get(ours[key]), f"{path}[{ours[key]}]")


def _is_same_amount(desired: Any, live: Any) -> bool:
    """Whether two quantities are equal: 1000m is 1, 1024Mi is 1Gi."""
    amounts = [_amount(desired), _amount(live)]
    return None not in amounts and amounts[0] == amounts[1]


def _amount(value: Any) -> Decimal | None:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    try:
        amount: Decimal = parse_quantity(value)
    except ValueError:
        return None
    return amount

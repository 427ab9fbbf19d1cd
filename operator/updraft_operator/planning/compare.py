"""Whether an object still is what was applied: all that we say must be there; what others add is theirs.

So API defaults, autoscalers and sidecar injectors cause no writes, and a field that someone turned does.
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
_TRUE_UNLESS_SAID = ("automountServiceAccountToken", "allowPrivilegeEscalation")
"""Fields whose absence is no False."""


def is_current(wished: Manifest, child: Child) -> bool:
    """Whether applying the manifest would change nothing. `wished` is marked with its hash."""
    metadata = wished["metadata"]
    if child.applied != metadata["annotations"][names.APPLIED]:
        return False
    return difference(wished, child.live()) == ""


def difference(wished: Manifest, live: Mapping[str, Any]) -> str:
    """The path of the first thing that is wished and is not so; empty if there is none."""
    said = {name: value for name, value in wished.items() if name not in ("apiVersion", "kind", "metadata")}
    found = next(_differences(said, live, ""), "")
    if found:
        return found
    ours = {name: wished["metadata"].get(name) for name in ("labels", "ownerReferences")}
    return next(_differences(ours, live.get("metadata", {}), "metadata"), "")


def _differences(wished: Any, live: Any, path: str) -> Iterator[str]:
    is_nothing = wished is None or wished in ({}, [])
    if is_nothing or (not wished and live is None and not path.endswith(_TRUE_UNLESS_SAID)):
        return  # {}, [], and absence are how the API says nothing
    if isinstance(wished, dict):
        if not isinstance(live, Mapping):
            yield path
        else:
            for name, value in wished.items():
                yield from _differences(value, live.get(name), f"{path}.{name}".lstrip("."))
    elif isinstance(wished, list):
        yield from _lists(wished, live, path)
    elif wished != live and not _is_same_amount(wished, live):
        yield path


def _lists(wished: list[Any], live: Any, path: str) -> Iterator[str]:
    if not isinstance(live, list):
        yield path
        return
    key = next((key for key in _KEYS if is_key_of(key, wished)), None)
    if key is None:
        if len(wished) != len(live):
            yield path
        for number, (ours, theirs) in enumerate(zip(wished, live, strict=False)):
            yield from _differences(ours, theirs, f"{path}[{number}]")
        return
    by_key = {each[key]: each for each in live if isinstance(each, dict) and isinstance(each.get(key), str | int)}
    for ours in wished:
        yield from _differences(ours, by_key.get(ours[key]), f"{path}[{ours[key]}]")


def _is_same_amount(wished: Any, live: Any) -> bool:
    """1000m is 1, 1024Mi is 1Gi."""
    amounts = [_amount(wished), _amount(live)]
    return None not in amounts and amounts[0] == amounts[1]


def _amount(value: Any) -> Decimal | None:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    try:
        amount: Decimal = parse_quantity(value)
    except ValueError:
        return None
    return amount

"""Merges a user's pod template over ours, as `kubectl patch` does: named entries by name, other lists as a whole.

Refused: the full schema of a pod template in the CRD (a megabyte), and JSON patches (they break when our lists grow).
"""

from typing import Any

_KEYS = ("name", "mountPath", "containerPort", "topologyKey", "key")
"""Merge keys of lists, as in Kubernetes; the first one that identifies all entries is used."""


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of theirs over ours; None removes a field."""
    result = {**ours}
    for name, value in theirs.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            before = ours.get(name)
            result[name] = merged(before if isinstance(before, dict) else {}, value)
        elif isinstance(value, list):
            before = ours.get(name)
            result[name] = _merged_lists(before if isinstance(before, list) else [], value)
        else:
            result[name] = value
    return result


def _merged_lists(ours: list[Any], theirs: list[Any]) -> list[Any]:
    key = _key(ours, theirs)
    if key is None:
        return [merged({}, entry) if isinstance(entry, dict) else entry for entry in theirs]
    result = {entry[key]: entry for entry in ours}
    for entry in theirs:
        result[entry[key]] = merged(result.get(entry[key], {}), entry)
    return list(result.values())


def _key(*lists: list[Any]) -> str | None:
    return next((key for key in _KEYS if all(is_key_of(key, entries) for entries in lists)), None)


def is_key_of(key: str, entries: list[Any]) -> bool:
    """Whether every entry has the field, and no two entries have the same value."""
    if not all(isinstance(entry, dict) and isinstance(entry.get(key), str | int) for entry in entries):
        return False
    return len({entry[key] for entry in entries}) == len(entries)

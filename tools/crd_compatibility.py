"""Compares the CRDs with those of the last release: which changes would break objects or clients that exist.

`python -m tools.crd_compatibility` prints them. `--release VERSION` stores the CRDs of now as those of a release.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from updraft_operator.api import crd

Schema = dict[str, Any]

RELEASED = Path(__file__).parents[1] / "operator" / "released"
"""A folder for each release, with its CRDs."""

_UPPER = ("maximum", "maxLength", "maxItems")
_LOWER = ("minimum", "minLength")
_SAME = (
    *("type", "pattern", "default", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    *("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"),
)
"""Keywords of which any change may refuse an object, or give it another meaning."""


_HARMLESS = (
    "mode Dedicated and urlSecretRef are two different Redis: remove one",
    "readerUrlSecretRef requires urlSecretRef",
    "maxMemory and storage require mode Dedicated",
    "startupSeconds: with mode Attached, set it in your workload",
)
"""Messages of rules that a person has checked: the release required urlSecretRef, and its objects get mode Shared by default
and have none of the other fields; it had no startupSeconds either."""


def last_release() -> Path:
    """The folder of the newest release."""
    return max(RELEASED.iterdir(), key=lambda folder: tuple(map(int, folder.name.removeprefix("v").split("."))))


def incompatible(released: Schema, current: Schema) -> Iterator[str]:
    """Each change of one CRD that breaks something, as a sentence that begins with a path."""
    old, new = released["spec"], current["spec"]
    for field in ("group", "scope", "names"):
        if old[field] != new[field]:
            yield f"{field}: changed from {old[field]} to {new[field]}"
    versions = {version["name"]: version for version in new["versions"] if version["served"]}
    for version in old["versions"]:
        served = versions.get(version["name"])
        if served is None:
            yield f"{version['name']}: no longer served"
            continue
        for name in version.get("subresources", {}):
            if version["subresources"][name] != served.get("subresources", {}).get(name):
                yield f"{version['name']}: subresource {name} changed"
        gone = [
            field for field in version.get("selectableFields", ()) if field not in served.get("selectableFields", ())
        ]
        yield from (f"{version['name']}: selectable field {field['jsonPath']} removed" for field in gone)
        yield from _schema(version["schema"]["openAPIV3Schema"], served["schema"]["openAPIV3Schema"], version["name"])


def _schema(old: Schema, new: Schema, path: str) -> Iterator[str]:
    yield from _keywords(old, new, path)
    yield from _rules(old, new, path)
    before, now = old.get("properties", {}), new.get("properties", {})
    yield from (f"{path}.{name}: removed" for name in before if name not in now)
    for name in new.get("required", ()):
        if name not in old.get("required", ()):
            yield f"{path}.{name}: now required"
    for name in before.keys() & now.keys():
        yield from _schema(before[name], now[name], f"{path}.{name}")
    if "items" in old and "items" in new:
        yield from _schema(old["items"], new["items"], f"{path}[]")


def _keywords(old: Schema, new: Schema, path: str) -> Iterator[str]:
    for word in _SAME:
        if old.get(word) != new.get(word) and not (word == "default" and _only_grew(old.get(word), new.get(word))):
            yield f"{path}: {word} changed from {old.get(word)} to {new.get(word)}"
    for words, sign in ((_UPPER, 1), (_LOWER, -1)):
        for word in words:
            if word in new and (word not in old or sign * new[word] < sign * old[word]):
                yield f"{path}: {word} is now {new[word]}, was {old.get(word, 'none')}"
    if "enum" in new and not set(old.get("enum", ())) <= set(new["enum"]):
        yield f"{path}: values removed: {', '.join(sorted(set(old['enum']) - set(new['enum'])))}"
    if "enum" in new and "enum" not in old:
        yield f"{path}: now an enum"


def _only_grew(old: Any, new: Any) -> bool:
    """Whether the default of an object is as before, except for fields that are new."""
    return isinstance(old, dict) and isinstance(new, dict) and old.items() <= new.items()


def _rules(old: Schema, new: Schema, path: str) -> Iterator[str]:
    """A rule that is new or another one may refuse what was accepted. Another message is no other rule."""
    before = {rule["rule"] for rule in old.get("x-kubernetes-validations", ())}
    for rule in new.get("x-kubernetes-validations", ()):
        if rule["rule"] not in before and rule["message"] not in _HARMLESS:
            yield f"{path}: new rule: {rule['message']}"


def problems() -> list[str]:
    """All incompatible changes since the last release."""
    found = []
    current = {definition["metadata"]["name"]: definition for definition in crd.definitions()}
    for file in sorted(last_release().glob("*.yaml")):
        released = yaml.safe_load(file.read_text())
        name = released["metadata"]["name"]
        if name not in current:
            found.append(f"{name}: removed")
            continue
        found += [f"{released['spec']['names']['kind']} {problem}" for problem in incompatible(released, current[name])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--release", metavar="VERSION", help="store the CRDs of now as those of this release, such as v0.1.0"
    )
    chosen = parser.parse_args()
    if chosen.release:
        folder = RELEASED / chosen.release
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in crd.files().items():
            (folder / name).write_text(text)
    found = problems()
    print("\n".join(found) or f"compatible with {last_release().name}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

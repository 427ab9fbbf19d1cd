"""A MutatingAdmissionPolicy that attaches each new pod of one namespace whose label asks for it. Pure.

The API server itself runs it, so no webhook can be away. It fails open: a pod that it cannot change starts without Updraft, and
condition Attached says so. CEL has no JSON, so the operator's description becomes part of the policy, as literals.
"""

import json
from collections.abc import Iterator
from typing import Any

from updraft_cli.attach.workload import SUFFIX, USUAL_NAMES, Addition, Json

_API = "admissionregistration.k8s.io/v1"
_ATTACH = "updraft.dev/attach"

_SERVER = "/spec/containers/' + string(variables.index) + '"
"""Path of the server's container, within a CEL text."""


def policy(addition: Addition, name: str, namespace: str) -> list[Json]:
    """The policy, and the binding that puts it into force for pods of `namespace` with label updraft.dev/attach: `name`."""
    metadata = {"name": f"updraft{SUFFIX}.{namespace}.{name}"}
    spec = {
        "failurePolicy": "Ignore",
        "reinvocationPolicy": "Never",
        "matchConstraints": {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "objectSelector": {"matchLabels": {_ATTACH: name}},
            "resourceRules": [
                {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
            ],
        },
        "matchConditions": list(_conditions(addition)),
        "variables": list(_variables(addition)),
        "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": " +\n".join(_operations(addition))}}],
    }
    bound = {"policyName": metadata["name"]}
    return [
        {"apiVersion": _API, "kind": "MutatingAdmissionPolicy", "metadata": metadata, "spec": spec},
        {"apiVersion": _API, "kind": "MutatingAdmissionPolicyBinding", "metadata": metadata, "spec": bound},
    ]


def _conditions(addition: Addition) -> Iterator[Json]:
    """Pods that were attached by hand, or whose server speculates already, stay as they are."""
    inits = "has(object.spec.initContainers)"
    agent = f"{inits} && object.spec.initContainers.exists(c, c.name == 'updraft-agent')"
    yield {"name": "not-attached-yet", "expression": f"!({agent})"}
    is_taken = " || ".join(f"a == o{end}" if not end else f"a.startsWith(o + '{end}')" for end in ("", "=", "."))
    args = f"has(c.args) && c.args.exists(a, {_literal(list(addition.taken))}.exists(o, {is_taken}))"
    yield {"name": "no-speculation-of-its-own", "expression": f"!object.spec.containers.exists(c, {args})"}


def _variables(addition: Addition) -> Iterator[Json]:
    """The position of the server's container; an error, and so no change, if it is not known."""
    names = "object.spec.containers.map(c, c.name)"
    usual = f"{_literal(list(USUAL_NAMES))}.filter(n, n in {names})[0]"
    chosen = _literal(addition.container) if addition.container else f"size({names}) == 1 ? {names}[0] : {usual}"
    yield {"name": "name", "expression": chosen}
    yield {"name": "index", "expression": f"{names}.indexOf(variables.name)"}
    yield {"name": "server", "expression": "object.spec.containers[variables.index]"}


def _operations(addition: Addition) -> Iterator[str]:
    """Lists of operations of a JSON patch, each in CEL."""
    for name, value in addition.pod["metadata"].get("annotations", {}).items():
        key = f"'/metadata/annotations/' + jsonpatch.escapeKey({_literal(name)})"
        yield _unless("object.metadata.annotations", "'/metadata/annotations'", "{}")
        yield f"[{_add(key, _literal(value))}]"
    for name, entries in addition.pod["spec"].items():
        yield from _appended(f"object.spec.{name}", f"'/spec/{name}", [_literal(entry) for entry in entries])
    paths = [each for each in addition.server["env"] if each["name"] == "PYTHONPATH"]
    others = [_literal(each) for each in addition.server["env"] if each not in paths]
    yield from _appended("variables.server.env", f"'{_SERVER}/env", others)
    yield from map(_python_path, paths)
    mounts = [_literal(each) for each in addition.server["volumeMounts"]]
    yield from _appended("variables.server.volumeMounts", f"'{_SERVER}/volumeMounts", mounts)
    yield from _appended(
        "variables.server.args", f"'{_SERVER}/args", [_literal(word) for word in addition.server["args"]]
    )


def _appended(field: str, path: str, entries: list[str]) -> Iterator[str]:
    """Operations that append to a list, which may be missing. The path has no closing quote yet."""
    yield _unless(field, f"{path}'", "[]")
    end = f"{path}/-'"
    yield f"[{', '.join(_add(end, entry) for entry in entries)}]"


def _python_path(variable: Json) -> str:
    """The plugin's folder goes before a path that the server has."""
    path, ours = f"'{_SERVER}/env", variable["value"]
    theirs = "has(variables.server.env) && variables.server.env.exists(e, e.name == 'PYTHONPATH')"
    position = "variables.server.env.map(e, e.name).indexOf('PYTHONPATH')"
    both = f"{_literal(ours + ':')} + variables.server.env[{position}].value"
    replaced = f"JSONPatch{{op: 'replace', path: {path}/' + string({position}) + '/value', value: {both}}}"
    added = _add(f"{path}/-'", _literal(variable))
    return f"({theirs} ? [{replaced}] : [{added}])"


def _unless(field: str, path: str, value: str) -> str:
    return f"(has({field}) ? [] : [{_add(path, value)}])"


def _add(path: str, value: str) -> str:
    return f"JSONPatch{{op: 'add', path: {path}, value: {value}}}"


def _literal(value: Any) -> str:
    """JSON as CEL, whose maps and lists have entries of one type unless each is called dyn."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: dyn({_literal(part)})" for name, part in value.items()) + "}"
    if isinstance(value, list):
        is_plain = all(isinstance(part, str) for part in value)
        return "[" + ", ".join(_literal(part) if is_plain else f"dyn({_literal(part)})" for part in value) + "]"
    return json.dumps(value)

"""The CRDs keep the Kubernetes API conventions, as kube-api-linter checks them in Go types.

A rule may have exceptions, which docs/api-policy.md explains. A test fails for an exception that is none any more, too.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.chart.chart import CHART, CHECKOUT

Schema = dict[str, Any]
Node = tuple[str, Schema]
"""A path such as asp.spec.rollout.steps[].holdSeconds, and its schema."""

_CAMEL_CASE = re.compile(r"^[A-Z][A-Za-z0-9]*$")
_SENTINEL = re.compile(r"\b0 (means|serves|is no)\b")
_FLOATS = ("number",)

EXCEPTIONS: dict[str, set[str]] = {
    "no phase: conditions say it": {
        "asp.status.rollout.phase",
        "asp.status.trainer.progress.phases[].phase",
        "dver.status.phase",
        "dver.status.history[].phase",
    },
    "a string has a maximum, a format or values": {
        f"asp.spec.{part}.env[].name" for part in ("serving", "trainer", "registry")
    },
}


def _definitions() -> Iterator[Schema]:
    for path in sorted((CHART / "files" / "crds").iterdir()):
        yield yaml.safe_load(path.read_text())


def _version(definition: Schema) -> Schema:
    (version,) = definition["spec"]["versions"]
    return dict(version)


def _nodes() -> Iterator[Node]:
    for definition in _definitions():
        root = _version(definition)["schema"]["openAPIV3Schema"]["properties"]
        (short,) = definition["spec"]["names"]["shortNames"]
        for part in ("spec", "status"):
            yield from _below(f"{short}.{part}", root[part])


def _below(path: str, node: Schema) -> Iterator[Node]:
    yield path, node
    for name, part in node.get("properties", {}).items():
        yield from _below(f"{path}.{name}", part)
    if "items" in node:
        yield from _below(f"{path}[]", node["items"])


def _name(path: str) -> str:
    return path.rpartition(".")[2].removesuffix("[]")


def _is_condition(path: str) -> bool:
    return ".conditions[]" in path


def _enums_that_are_not_camel_case(path: str, node: Schema) -> bool:
    return any(not _CAMEL_CASE.match(str(value)) for value in node.get("enum", ()))


def _sentinels(path: str, node: Schema) -> bool:
    return node.get("type") == "integer" and bool(_SENTINEL.search(node.get("description", "")))


def _phases(path: str, node: Schema) -> bool:
    return _name(path) == "phase"


def _enums_in_a_status(path: str, node: Schema) -> bool:
    return ".status" in path and "enum" in node and not _is_condition(path)


def _lists_without_a_type(path: str, node: Schema) -> bool:
    kind, keys = node.get("x-kubernetes-list-type"), node.get("x-kubernetes-list-map-keys", [])
    if node.get("type") != "array":
        return False
    return kind not in {"map", "set", "atomic"} or (kind == "map") != bool(keys) or "maxItems" not in node


def _keys_that_are_not_required(path: str, node: Schema) -> bool:
    keys = set(node.get("x-kubernetes-list-map-keys", ()))
    return not keys <= set(node.get("items", {}).get("required", ()))


def _floats(path: str, node: Schema) -> bool:
    return node.get("type") in _FLOATS


def _names_that_are_not_camel_case(path: str, node: Schema) -> bool:
    return not re.match(r"^[a-z][A-Za-z0-9]*$", _name(path))


def _strings_without_a_limit(path: str, node: Schema) -> bool:
    return node.get("type") == "string" and not node.keys() & {"maxLength", "enum", "format"}


def _integers_without_a_minimum(path: str, node: Schema) -> bool:
    return ".spec" in path and node.get("type") == "integer" and "minimum" not in node


def _times_with_another_name(path: str, node: Schema) -> bool:
    return node.get("format") == "date-time" and not re.search(r"(^t|T)ime$", _name(path))


def _durations_without_a_unit(path: str, node: Schema) -> bool:
    is_about_time = re.search(r"(Timeout|Interval|Period|Deadline|Duration|Delay)$", _name(path))
    return node.get("format") == "duration" or bool(is_about_time)


def _references_that_are_no_objects(path: str, node: Schema) -> bool:
    return _name(path).endswith("Ref") and "name" not in node.get("properties", {})


def _fields_of_a_spec_without_a_description(path: str, node: Schema) -> bool:
    is_plain = _name(path) in {"name", "key", "claimName", "path", "samples", "firstTraceId", "lastTraceId", "version"}
    is_part = path.endswith("[]") or path.count(".") == 1
    return ".spec" in path and not is_part and not is_plain and "description" not in node


RULES = {
    "values of an enum are CamelCase": _enums_that_are_not_camel_case,
    "no number stands for something else": _sentinels,
    "no phase: conditions say it": _phases,
    "no enum in a status, because a new value would break readers": _enums_in_a_status,
    "a list has a type, keys if it is a map, and a maximum": _lists_without_a_type,
    "keys of a list are required": _keys_that_are_not_required,
    "no floats": _floats,
    "fields are in camelCase": _names_that_are_not_camel_case,
    "a string has a maximum, a format or values": _strings_without_a_limit,
    "an integer of a spec has a minimum": _integers_without_a_minimum,
    "a time is called time": _times_with_another_name,
    "a duration has its unit in its name": _durations_without_a_unit,
    "a reference is an object with a name": _references_that_are_no_objects,
    "a field of a spec has a description": _fields_of_a_spec_without_a_description,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_schema_keeps_the_conventions_except_where_it_says_so(rule: str) -> None:
    assert {path for path, node in _nodes() if RULES[rule](path, node)} == EXCEPTIONS.get(rule, set())


def test_every_exception_is_of_a_rule_and_explained_in_the_policy() -> None:
    assert EXCEPTIONS.keys() <= RULES.keys()
    policy = (CHECKOUT / "docs" / "api-policy.md").read_text()
    for path in set().union(*EXCEPTIONS.values()):
        assert f"`{path.partition('.')[2]}`" in policy, path


def test_both_kinds_have_a_status_of_their_own_that_tells_what_was_observed() -> None:
    for definition in _definitions():
        version = _version(definition)
        status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
        assert "status" in version["subresources"]
        assert status["observedGeneration"] == {"type": "integer", "format": "int64"}


def test_conditions_are_a_map_by_type_with_the_fields_of_all_conditions() -> None:
    for definition in _definitions():
        root = _version(definition)["schema"]["openAPIV3Schema"]["properties"]
        conditions = root["status"]["properties"]["conditions"]
        assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])
        item = conditions["items"]
        assert set(item["required"]) == {"type", "status", "lastTransitionTime", "reason", "message"}
        assert set(item["properties"]) == {*item["required"], "observedGeneration"}
        assert item["properties"]["status"]["enum"] == ["True", "False", "Unknown"]


def test_names_are_those_of_a_kind_that_people_type() -> None:
    for definition in _definitions():
        names = definition["spec"]["names"]
        assert names["singular"] == names["kind"].lower()
        assert names["plural"] == f"{names['singular']}s"
        assert definition["metadata"]["name"] == f"{names['plural']}.{definition['spec']['group']}"
        assert definition["spec"]["scope"] == "Namespaced"


def test_columns_say_whether_an_object_is_ready_or_where_it_stands_and_how_old_it_is() -> None:
    for definition in _definitions():
        columns = _version(definition)["additionalPrinterColumns"]
        shown = [column["name"] for column in columns if not column.get("priority")]
        assert {"Ready", "Phase"} & set(shown)
        assert shown[-1] == "Age"
        assert len({column["name"] for column in columns}) == len(columns)
        assert len(shown) <= 8

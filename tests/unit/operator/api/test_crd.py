"""The CRDs as data: structural, small, described, defaulted as the models are, and each rule and limit with a case."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.cluster.crd.limits import LIMITS
from tests.cluster.crd.resources import SPECULATOR, resource
from tests.cluster.crd.rules import RULES
from tools import api_reference

from updraft_operator.api import crd
from updraft_operator.api.crd import Kind, Schema
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.api.status import PENDING, Status

KINDS: dict[str, Kind] = {"asp": AdaptiveSpeculator, "dver": DraftVersion, "dimp": DraftImport}
LARGEST_BYTES = 64_000

_SAID = {
    "minimum": "greater than or equal",
    "maximum": "less than or equal",
    "minLength": "at least 1 chars",
    "maxLength": "may not be more than",
    "maxItems": "must have at most",
    "pattern": "should match",
    "enum": "supported values",
    "required": "Required value",
    "x-kubernetes-list-map-keys": "Duplicate value",
}
"""What the API server says about what is beyond a limit."""

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=KINDS)
def root(request: pytest.FixtureRequest) -> Schema:
    return crd.schema(KINDS[request.param])


def test_all_together_are_small_enough_for_plain_kubectl_apply() -> None:
    assert sum(len(text.encode()) for text in crd.files().values()) < LARGEST_BYTES


def test_the_files_hold_what_the_definitions_say() -> None:
    read = {name: yaml.safe_load(text) for name, text in crd.files().items()}
    assert read == {f"{definition['metadata']['name']}.yaml": definition for definition in crd.definitions()}


def test_every_value_has_one_type_and_nothing_refers_to_elsewhere(root: Schema) -> None:
    foreign = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "title", "const", "nullable"}
    for path, node in _nodes(root):
        assert foreign.isdisjoint(node), path
        assert ("type" in node) != ("x-kubernetes-int-or-string" in node), path
        assert node.get("type") != "number", path


def test_every_object_is_either_ours_or_kept_as_it_is(root: Schema) -> None:
    for path, node in _nodes(root):
        if node.get("type") == "object" and path != "metadata":
            kept = node.get("x-kubernetes-preserve-unknown-fields")
            assert "properties" in node or kept or "maxProperties" in node, path
        if node.get("type") == "array":
            assert "items" in node, path
            assert "maxItems" in node, path


def test_no_default_is_null_or_says_nothing(root: Schema) -> None:
    for path, node in _nodes(root):
        assert node.get("default", 0) not in (None, []), path
        if node.get("default") == {}:
            assert any("default" in part for part in node["properties"].values()), path


@each_kind
def test_the_schema_fills_in_what_the_models_have_as_defaults(kind: str) -> None:
    written = resource(kind)
    filled = _filled(crd.schema(KINDS[kind]), written)
    assert filled["spec"] == _without_nothing(
        KINDS[kind].model_validate(written).spec.model_dump(mode="json", by_alias=True)
    )


def test_the_status_has_no_default_but_that_it_is_not_written_yet(root: Schema) -> None:
    assert [path for path, node in _nodes(root["properties"]["status"]) if "default" in node] == [""]
    (pending,) = Status.model_validate(root["properties"]["status"]["default"]).conditions
    assert (pending.type, pending.status, pending.reason) == ("Ready", "Unknown", PENDING)


def test_everything_that_a_person_writes_is_described(root: Schema) -> None:
    silent = {path for path, node in _nodes(root["properties"]["spec"]) if not _is_described(node)}
    # A name in a reference to a Secret, a claim or a speculator, or an identifier of a trace: the object around it says it.
    assert {path for path in silent if path.rpartition(".")[2] not in _PLAIN} == set()


def test_descriptions_are_single_lines(root: Schema) -> None:
    for path, node in _nodes(root):
        assert "\n" not in node.get("description", ""), path


def test_columns_and_subresources_lead_to_fields_that_exist() -> None:
    for definition in crd.definitions():
        version = definition["spec"]["versions"][0]
        root = version["schema"]["openAPIV3Schema"]
        scale = version["subresources"].get("scale", {})
        fields = [field["jsonPath"] for field in version.get("selectableFields", [])]
        columns = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
        for path in (*scale.values(), *fields, *columns):
            if not path.startswith(".metadata."):
                assert _at(root, path) is not None, path


@each_kind
def test_every_rule_has_a_case(kind: str) -> None:
    messages = {rule["message"] for _, node in _nodes(crd.schema(KINDS[kind])) for rule in node.get(_VALIDATIONS, [])}
    tested = [rule.message for rule in RULES if rule.kind == kind]
    assert {message for message in messages if not message.startswith(tuple(tested))} == set()
    assert [message for message in tested if not any(words.startswith(message) for words in messages)] == []


@each_kind
def test_every_limit_of_a_spec_has_a_case(kind: str) -> None:
    spec = crd.schema(KINDS[kind])["properties"]["spec"]
    described = {
        (limit.path, words)
        for limit in LIMITS
        if limit.kind == kind
        for words in _SAID
        if _SAID[words] in limit.message
    }
    limits = {
        (path.partition("[]")[0].partition("{}")[0], word)
        for path, node in _nodes(spec)
        for word in _SAID
        if word in node
    }
    # Of what is required, targetModel.uri stands for all, and that a list's key is required is part of the list.
    assert {(path, word) for path, word in limits - described if word != "required"} == set()


def test_the_reference_has_every_field_once_in_its_place() -> None:
    page = api_reference.page()
    for kind in KINDS.values():
        rest = page.partition(f"\n## {kind.__name__}\n")[2].partition("\n## ")[0]
        fields = [line.split("`")[1].rpartition(".")[2] for line in rest.splitlines() if line.startswith("| `")]
        root = crd.schema(kind)["properties"]
        paths = [
            path
            for part in ("spec", "status")
            for path, node in _nodes(root[part])
            if path and not path.endswith(("[]", "{}"))
        ]
        own = [path for path in paths if not path.endswith("env[].name")]
        assert sorted(fields) == sorted(path.rpartition(".")[2] for path in own)


def test_the_reference_tells_defaults_limits_and_rules() -> None:
    page = api_reference.page()
    assert "| `lookahead` | integer, 1 to 16 | `3` | Maximum number of tokens drafted per verify step" in page
    assert "| `size` | " not in page
    assert (
        "| `storage.size` | text, a quantity such as `10Gi` | `80Gi` | Size of the new claim. The default fits" in page
    )
    assert (
        "| `speculatorRef` | object | required | The AdaptiveSpeculator in the same namespace that the draft is for. |"
        in page
    )
    assert "\n- `modelCache`: choose one of pvc and hostPath\n" in page


def test_the_examples_are_the_least_resources() -> None:
    speculator = AdaptiveSpeculator.model_validate(api_reference.EXAMPLES["AdaptiveSpeculator"])
    draft_import = DraftImport.model_validate(api_reference.EXAMPLES["DraftImport"])
    assert speculator.spec.model_dump(exclude_defaults=True, by_alias=True).keys() == SPECULATOR.keys()
    assert draft_import.spec.speculator_ref.name == speculator.metadata.name


_VALIDATIONS = "x-kubernetes-validations"
_PLAIN = {
    "windows[]",
    "name",
    "key",
    "path",
    "claimName",
    "samples",
    "firstTraceId",
    "lastTraceId",
    "env[]",
    "args[]",
    "matchLabels{}",
}


def _nodes(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """A schema and all in it, by their paths from there."""
    yield path, node
    for name, part in node.get("properties", {}).items():
        yield from _nodes(part, f"{path}.{name}".lstrip("."))
    if "items" in node:
        yield from _nodes(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from _nodes(node["additionalProperties"], f"{path}{{}}")


def _is_described(node: Schema) -> bool:
    return "description" in node or "description" in node.get("items", {})


def _at(root: Schema, path: str) -> Schema | None:
    """The schema at a JSONPath as columns have it: names, and a filter of a list of conditions."""
    node = root
    for name in path.replace('?(@.type=="Ready")', "").replace('?(@.type=="Adapting")', "").lstrip(".").split("."):
        part = node.get("properties", {}).get(name.removesuffix("[]"))
        if part is None:
            return None
        node = part["items"] if name.endswith("[]") else part
    return node


def _filled(node: Schema, value: Any) -> Any:
    """As the API server fills in defaults."""
    if "items" in node:
        return [_filled(node["items"], entry) for entry in value]
    if "properties" not in node:
        return value
    given = {name: part["default"] for name, part in node["properties"].items() if "default" in part}
    parts = node["properties"]
    return {name: _filled(parts[name], inside) for name, inside in {**given, **value}.items() if name in parts}


def _without_nothing(value: Any) -> Any:
    """Without what is absent or empty, in depth."""
    if isinstance(value, list):
        return [_without_nothing(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    inside = {name: _without_nothing(part) for name, part in value.items()}
    return {name: part for name, part in inside.items() if part not in (None, {}, [])}

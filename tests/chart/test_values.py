"""Values are documented, checked before anything is installed, and agree with the rest of the project."""

import json
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.chart.chart import CHART, CHECKOUT, helm, refusal
from tools import chart_reference
from yamllint import linter
from yamllint.config import YamlLintConfig

_LINT = YamlLintConfig(
    "{extends: default, rules: {line-length: {max: 128}, document-start: disable,"
    " comments-indentation: disable, braces: {max-spaces-inside: 0}}}"
)


def _paths(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _paths(value, (*path, key))


def _allowed(schema: dict[str, Any], part: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    for key, below in part.get("properties", {}).items():
        yield (*path, key)
        yield from _allowed(schema, below, (*path, key))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("replicsa=3",), "additional properties 'replicsa' not allowed", id="a misspelt value"),
        pytest.param(
            ("redis.passwrod=x",), "at '/redis': additional properties 'passwrod' not allowed", id="and below"
        ),
        pytest.param(("replicas=-1",), "at '/replicas': minimum: got -1, want 0", id="fewer than none"),
        pytest.param(("replicas=two",), "at '/replicas': got string, want integer", id="a word for a number"),
        pytest.param(
            ("image.pullPolicy=always",), "value must be one of 'Always', 'IfNotPresent', 'Never'", id="a policy"
        ),
        pytest.param(("image.registry=https://a.example.com",), "at '/image/registry'", id="a registry with a scheme"),
        pytest.param(("images.operator.digest=sha256:123",), "at '/images/operator/digest'", id="a short digest"),
        pytest.param(("watchNamespaces={A_b}",), "at '/watchNamespaces/0'", id="no name of a namespace"),
        pytest.param(("watchNamespaces={a,a}",), "at '/watchNamespaces': items at 0 and 1 are equal", id="one twice"),
        pytest.param(("resyncSeconds=3600",), "at '/resyncSeconds': maximum: got 3,600, want 600", id="a rare listing"),
        pytest.param(("logLevel=debug",), "at '/logLevel': value must be one of 'DEBUG', 'INFO'", id="a level"),
        pytest.param(("redis.url=http://redis:6379", "redis.enabled=false"), "at '/redis/url'", id="a URL of no Redis"),
        pytest.param(("redis.maxMemory=1GiB",), "at '/redis/maxMemory'", id="a unit that Redis does not know"),
        pytest.param(
            ("monitoring.podMonitors.enabled=perhaps",), "value must be one of 'auto', true, false", id="perhaps"
        ),
        pytest.param(("tls.mode=On",), "at '/tls/mode': value must be one of 'SelfSigned'", id="a mode of TLS"),
        pytest.param(("tls.mode=CertManager",), "tls.issuer.name: name the issuer of cert-manager", id="no issuer"),
        pytest.param(("monitoring.prometheusRule.runbookUrl=docs",), "at '/monitoring/prometheusRule", id="no URL"),
        pytest.param(
            ("redis.url=redis://h:6379",), "redis: set enabled: false to use the Redis of redis.url", id="two"
        ),
        pytest.param(
            ("redis.enabled=false", "redis.url=redis://h:6379", "redis.existingSecret.name=a"),
            "redis: set one of url and existingSecret, not both",
            id="two of ones own",
        ),
        pytest.param(("leaderElection=false",), "without leaderElection two operators would work", id="two that work"),
        pytest.param(
            ("serviceAccount.create=false",), "serviceAccount.name: name your ServiceAccount", id="no account"
        ),
        pytest.param(
            ("monitoring.prometheusRule.enabled=true", "monitoring.prometheusRule.disabled={UpdraftNoSuch}"),
            "monitoring.prometheusRule.disabled: there is no alert UpdraftNoSuch",
            id="an alert that there is not",
        ),
    ],
)
def test_what_is_wrong_is_refused_in_words_that_name_it(words: tuple[str, ...], message: str) -> None:
    assert message in refusal(*(word for each in words for word in ("--set", each)))


def test_a_kubernetes_that_is_too_old_is_refused() -> None:
    assert "incompatible with Kubernetes v1.30.0" in refusal("--kube-version", "1.30.0")


def test_every_value_is_documented() -> None:
    documented = {value.path for value in chart_reference.documented(CHART / "values.yaml")}
    maps = {path[:length] for path in documented for length in range(1, len(path))}

    bare = {
        path
        for path in _paths(yaml.safe_load((CHART / "values.yaml").read_text()))
        if path not in maps and not any(path[:length] in documented for length in range(1, len(path) + 1))
    }

    assert bare == set()


def test_whatever_the_schema_allows_is_in_the_values_to_be_found() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    missing = set(_allowed(schema, schema)) - set(_paths(yaml.safe_load((CHART / "values.yaml").read_text())))

    # Of subcharts, and of Kubernetes' own resources.
    assert {path for path in missing if path[-1] not in {"requests", "limits", "claims"}} == {("global",)}


def test_the_readme_has_the_table_of_the_values() -> None:
    assert (CHART / "README.md").read_text() == chart_reference.readme(CHART)


def test_yaml_is_written_as_yamllint_likes_it() -> None:
    files = [
        CHART / "values.yaml",
        CHART / "Chart.yaml",
        CHART / "files" / "alerts.yaml",
        *sorted((CHART / "ci").iterdir()),
        CHECKOUT / "tests" / "chart" / "alerts_test.yaml",
    ]

    problems = [f"{path.name}:{problem}" for path in files for problem in linter.run(path.read_text(), _LINT)]

    assert problems == []


def test_the_chart_installs_the_version_that_it_is_of() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]

    assert chart["appVersion"] == project["version"]
    images = yaml.safe_load(chart["annotations"]["artifacthub.io/images"])
    assert {image["image"].rpartition(":")[2] for image in images} == {project["version"]}


def test_what_artifact_hub_is_told_is_so() -> None:
    annotations = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]

    crds = [yaml.safe_load(path.read_text()) for path in sorted((CHART / "files" / "crds").iterdir())]
    told = yaml.safe_load(annotations["artifacthub.io/crds"])
    assert [(each["name"], each["kind"]) for each in told] == [
        (crd["metadata"]["name"], crd["spec"]["names"]["kind"]) for crd in crds
    ]
    assert all(each["version"] == crd["spec"]["versions"][0]["name"] for each, crd in zip(told, crds, strict=True))


def test_the_package_holds_what_it_needs_and_no_more(tmp_path: Any) -> None:
    result = helm("package", CHART, "--destination", tmp_path)
    assert result.returncode == 0, result.stderr
    (package,) = tmp_path.iterdir()
    listing = helm("show", "values", package)

    assert listing.stdout.strip() == (CHART / "values.yaml").read_text().strip()
    assert package.stat().st_size < 100_000, "a release is a Secret, which holds a megabyte"

"""Alerts and panels ask for what the code exposes, alerts fire when they should, and monitors find the pods."""

import functools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from tests.chart.chart import CHART, CHECKOUT, Document, of_kind, one, rendered, title
from tests.chart.go_program import PROMTOOL
from tests.support.manifests import speculator
from tests.support.observed import NOW, observed, pod

from updraft_chassis import settings
from updraft_inference.agent.selection import Refusal
from updraft_operator.api.speculator import (
    AdaptiveSpeculator,
    Engine,
    EngineType,
    Metadata,
    Spec,
    TargetModel,
    Trainer,
    TrainerAccelerator,
)
from updraft_operator.manifests import registry, serving, trainer
from updraft_operator.manifests.manifest import Images, OperatorConfig
from updraft_operator.manifests.tls.terms import Tls, TlsMode
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import ConnectionState, MissingSecret, Observed, RegistryView
from updraft_operator.planning.status import status
from updraft_operator.settings import OperatorSettings
from updraft_registry.metrics import OUTCOMES
from updraft_rollouts.terms import Phase

ALERTS_TEST = Path(__file__).parent / "alerts_test.yaml"
TARGET_LABELS = {"job", "instance", "namespace", "pod", "speculator", "le"}
"""Of whatever is scraped through our monitors; `le` is of every histogram."""

_ROW = re.compile(r"^\| `(updraft_\w+)` \| (\w+) \| ([^|]*) \|", re.MULTILINE)
_FUNCTIONS = {
    *("absent", "sum", "max", "min", "avg", "count", "rate", "increase", "delta", "changes", "min_over_time"),
    *("histogram_quantile", "by", "on", "and", "or", "unless", "bool", "vector"),
}


@functools.cache
def exposed() -> dict[str, set[str]]:
    """Labels of every metric, by the name that is scraped, from the generated page (docs/reference/metrics.md)."""
    page = (CHECKOUT / "docs" / "reference" / "metrics.md").read_text()
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in _ROW.findall(page)}
    names: dict[str, set[str]] = {"up": set()}
    for name, (kind, labels) in listed.items():
        samples = [f"{name}_{sample}" for sample in ("bucket", "sum", "count")] if kind == "histogram" else [name]
        names |= dict.fromkeys(samples, labels)
    return names


def problems(expression: str) -> Iterator[str]:
    """What an expression asks for that nothing exposes."""
    text = re.sub(r"#.*", "", expression)
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", text):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers):
            if label not in exposed().get(name, set()) | TARGET_LABELS:
                yield f"{name} has no label {label}"
    grouped = {
        label for labels in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", text) for label in re.findall(r"\w+", labels)
    }
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on)\s*\([^)]*\)|\"[^\"]*\"", " ", text)
    asked = {word for word in re.findall(r"[a-zA-Z_]\w*", bare) if word not in _FUNCTIONS}
    yield from (f"nothing exposes {name}" for name in sorted(asked - exposed().keys()))
    known = TARGET_LABELS.union(*(exposed().get(name, set()) for name in asked))
    yield from (f"no metric of it has the label {label}" for label in sorted(grouped - known))


def _rules(case: str = "monitoring") -> list[Document]:
    (found,) = of_kind(rendered(case), "PrometheusRule")
    return [rule for group in found["spec"]["groups"] for rule in group["rules"]]


def _dashboards() -> list[Document]:
    return [json.loads(path.read_text()) for path in sorted((CHART / "files" / "dashboards").iterdir())]


def _panels() -> Iterator[tuple[str, str]]:
    for dashboard in _dashboards():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield f"{dashboard['title']}: {panel['title']}", target["expr"]


def _alert_tests() -> Iterator[Document]:
    for group in yaml.safe_load(ALERTS_TEST.read_text())["tests"]:
        yield from group["alert_rule_test"]


@pytest.fixture(scope="module")
def promtool() -> Path:
    """Prometheus' own tool."""
    if not PROMTOOL.binary.exists():
        pytest.skip("promtool: not built; run `python -m tests.chart.go_program` (once; 3 minutes)")
    return PROMTOOL.binary


def _run(*words: str | Path) -> None:
    result = subprocess.run(words, text=True, capture_output=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_asks_for_metrics_that_are_exposed() -> None:
    found = [f"{rule['alert']}: {problem}" for rule in _rules() for problem in problems(rule["expr"])]

    assert found == []


def test_every_panel_asks_for_metrics_that_are_exposed() -> None:
    found = [f"{name}: {problem}" for name, expression in _panels() for problem in problems(expression)]

    assert found == []


def test_the_output_that_a_draft_cannot_propose_is_on_a_panel() -> None:
    assert [name for name, expression in _panels() if "updraft_trainer_unknown_tokens_ratio" in expression] == [
        "Updraft / Fleet: Output that the draft cannot propose"
    ]


def test_a_misspelt_metric_and_a_label_that_is_not_there_are_found() -> None:
    assert list(problems('rate(updraft_inference_request_total{finish="x"}[5m]) > 0')) == [
        "updraft_inference_request_total has no label finish",
        "nothing exposes updraft_inference_request_total",
    ]
    assert list(problems('sum by (colour) (updraft_registry_pods{kind="a"})')) == [
        "updraft_registry_pods has no label kind",
        "no metric of it has the label colour",
    ]


def test_every_metric_of_the_operator_is_on_its_dashboard() -> None:
    shown = " ".join(expression for name, expression in _panels() if name.startswith("Updraft / Operator"))

    missing = {name for name in exposed() if name.startswith("updraft_operator_") and name not in shown}

    assert {name for name in missing if not name.endswith(("_sum", "_count"))} == set()


def test_values_of_labels_in_alerts_are_the_codes_own() -> None:
    text = (CHART / "files" / "alerts.yaml").read_text()

    refusals = f"{Refusal.OPTED_OUT}|{Refusal.NOT_OPTED_IN}|{Refusal.NOT_ASKED}|{Refusal.OTHER_REGION}"
    assert f'reason!~"{refusals}"' in text, "senders refuse, so nobody has to be woken"
    assert f'outcome="{OUTCOMES[Phase.ROLLED_BACK]}"' in text


def test_every_alert_links_to_its_section_in_the_runbooks_where_they_are_served() -> None:
    sections = set(re.findall(r"^## (\w+)$", (CHECKOUT / "docs" / "runbooks.md").read_text(), re.MULTILINE))

    assert sections == {rule["alert"] for rule in _rules()}
    for rule in _rules("everything"):
        assert rule["annotations"]["runbook_url"] == f"https://wiki.example.com/updraft#{rule['alert'].lower()}"


def test_alerts_say_what_is_wrong_and_how_much_it_matters() -> None:
    for rule in _rules():
        assert rule["annotations"].keys() == {"summary", "description"}, "no address that nobody chose"
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule["alert"]


def test_only_what_takes_something_from_clients_wakes_somebody() -> None:
    assert {rule["alert"] for rule in _rules() if rule["labels"]["severity"] == "page"} == {
        "UpdraftSpeculatorUnavailable",
        "UpdraftRequestsRefused",
        "UpdraftTargetChanged",
    }


def test_alerts_can_be_left_out_labelled_and_linked_elsewhere() -> None:
    rules, all_of_them = _rules("everything"), {rule["alert"] for rule in _rules()}

    assert all_of_them - {rule["alert"] for rule in rules} == {"UpdraftTraceLagGrows", "UpdraftRegistryDenies"}
    assert all(rule["labels"]["team"] == "inference" for rule in rules)
    assert all(rule["annotations"]["runbook_url"].startswith("https://wiki.example.com/updraft#") for rule in rules)


def test_prometheus_takes_the_alerts(promtool: Path, tmp_path: Path) -> None:
    (found,) = of_kind(rendered("monitoring"), "PrometheusRule")
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(found["spec"]))

    _run(promtool, "check", "rules", "--lint=all", "--lint-fatal", rules)


def test_every_alert_fires_when_it_should_and_not_before(promtool: Path, tmp_path: Path) -> None:
    groups = one(rendered("monitoring"), "PrometheusRule", "updraft")["spec"]["groups"]
    bare = [{**group, "rules": [_without_annotations(rule) for rule in group["rules"]]} for group in groups]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": bare}))
    (tmp_path / ALERTS_TEST.name).write_text(ALERTS_TEST.read_text())

    _run(promtool, "test", "rules", tmp_path / ALERTS_TEST.name)


_HUNDRED = {"serving": {"replicas": 100}}


def _fleet(num_ready: int, *, reached: int | None = 100, spec: Document | None = None, **more: Any) -> Observed:
    """A hundred pods, so many of them ready; the others are killed for their memory, or loading for the first time."""
    chosen, problem = {**_HUNDRED, **(spec or {})}, ("OOMKilled", "too much") if reached else None
    ready = [pod(f"qwen-serving-{number}", is_ready=True) for number in range(num_ready)]
    others = [pod(f"qwen-serving-x{number}", problem=problem) for number in range(100 - num_ready)]
    before = {"serving": {"reachedReplicas": reached}} if reached else {}
    owner = speculator(chosen, status=before)
    return observed(chosen, speculator=owner, pods=(*ready, *others), **more)


@pytest.mark.parametrize(
    ("seen", "pages"),
    [
        pytest.param(_fleet(100), [], id="all pods"),
        pytest.param(_fleet(98), [], id="98 of 100 pods"),
        pytest.param(_fleet(90), [], id="as many as the budget allows"),
        pytest.param(_fleet(89), ["UpdraftSpeculatorUnavailable"], id="fewer than the budget allows"),
        pytest.param(_fleet(0), ["UpdraftSpeculatorUnavailable"], id="none"),
        pytest.param(_fleet(0, reached=None), [], id="none, because they load for the first time"),
        pytest.param(_fleet(2, reached=2), [], id="a scale-up"),
        pytest.param(_fleet(0, spec={"suspend": True}), [], id="suspended"),
        pytest.param(_fleet(100, registry=RegistryView(connection=ConnectionState.UNREACHABLE)), [], id="no registry"),
        pytest.param(_fleet(100, missing_secrets=(MissingSecret("hub"),)), [], id="a Secret that is missing"),
    ],
)
def test_only_an_outage_of_clients_pages(promtool: Path, tmp_path: Path, seen: Observed, pages: list[str]) -> None:
    groups = one(rendered("monitoring"), "PrometheusRule", "updraft")["spec"]["groups"]
    bare = [{**group, "rules": [_without_annotations(rule) for rule in group["rules"]]} for group in groups]
    paging = [rule["alert"] for group in bare for rule in group["rules"] if rule["labels"]["severity"] == "page"]
    labels = {"severity": "page", "namespace": "team", "speculator": "qwen"}
    expected = [
        {"eval_time": "1h", "alertname": name, "exp_alerts": [{"exp_labels": labels}] if name in pages else []}
        for name in paging
    ]
    series = [{"series": name, "values": "1x120"} for name in _exported(seen)]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": expected}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": bare}))
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))

    _run(promtool, "test", "rules", tmp_path / "test.yaml")


def _exported(seen: Observed) -> Iterator[str]:
    """Series of an operator that leads and has written this status."""
    collectors = CollectorRegistry()
    metrics = Metrics(collectors)
    metrics.leader.set(1)
    metrics.show(Key("team", "qwen"), status(seen, NOW).conditions)
    for metric in collectors.collect():
        for sample in metric.samples:
            if metric.name in ("updraft_operator_condition", "updraft_operator_leader"):
                told = {"job": "updraft-operator", "instance": "a", **sample.labels}
                yield f"{sample.name}{{{', '.join(f'{name}={json.dumps(value)}' for name, value in told.items())}}}"


def _without_annotations(rule: Document) -> Document:
    return {key: value for key, value in rule.items() if key != "annotations"}


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    alerts = {rule["alert"] for rule in _rules()}

    assert {test["alertname"] for test in _alert_tests() if test["exp_alerts"]} == alerts
    assert {test["alertname"] for test in _alert_tests() if not test["exp_alerts"]} == alerts


def test_alerts_name_only_labels_that_they_have() -> None:
    labels: dict[str, set[str]] = {}
    for test in _alert_tests():
        for alert in test["exp_alerts"]:
            labels.setdefault(test["alertname"], set()).update(alert["exp_labels"])

    for rule in _rules():
        named = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert named <= labels[rule["alert"]], rule["alert"]


def test_every_expression_of_a_panel_is_promql(promtool: Path, tmp_path: Path) -> None:
    expressions = [re.sub(r"\$__rate_interval", "5m", expression) for _, expression in _panels()]
    records = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions)]
    rules = tmp_path / "panels.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))

    _run(promtool, "check", "rules", "--lint=none", rules)


def test_dashboards_are_found_by_grafana_and_stand_in_order() -> None:
    config_maps = [
        document
        for document in of_kind(rendered("monitoring"), "ConfigMap")
        if document["metadata"]["labels"].get("grafana_dashboard") == "1"
    ]

    found = [json.loads(text) for document in config_maps for text in document["data"].values()]
    assert sorted(found, key=lambda dashboard: str(dashboard["uid"])) == _dashboards()
    for dashboard in _dashboards():
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids)
        taken: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, f"{panel['title']} covers another panel"
            assert all(0 <= x < 24 for x, _ in cells), panel["title"]
            taken |= cells


@pytest.mark.parametrize(
    ("part", "scraped"),
    [
        ("inference", ["http"]),
        pytest.param("vllm", ["http", "metrics"], id="inference, a server and its agent"),
        pytest.param("trainer", ["metrics", "metrics-1", "metrics-2"], id="trainer, each rank of a pod"),
        ("registry", ["metrics"]),
    ],
)
def test_pod_monitors_find_the_pods_that_the_operator_makes(part: str, scraped: list[str]) -> None:
    template = _template(part)
    spec = one(rendered("monitoring"), "PodMonitor", f"updraft-{'inference' if part == 'vllm' else part}")["spec"]

    (endpoint,) = spec["podMetricsEndpoints"]
    pod = template["spec"]
    containers = [*pod["containers"], *pod.get("initContainers", ())]
    ports = [port["name"] for container in containers for port in container.get("ports", ())]
    kept = next(one for one in endpoint["relabelings"] if one.get("action") == "keep")
    assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert kept["sourceLabels"] == ["__meta_kubernetes_pod_container_port_name"]
    assert [port for port in ports if re.fullmatch(kept["regex"], port)] == scraped
    assert "updraft.dev/speculator" in template["metadata"]["labels"]
    assert endpoint["relabelings"][-1]["sourceLabels"] == ["__meta_kubernetes_pod_label_updraft_dev_speculator"]


@pytest.mark.parametrize("part", ["inference", "vllm", "trainer", "registry"])
def test_pod_monitors_find_ports_with_tls_and_scrape_them_so(part: str) -> None:
    tls = Tls(mode=TlsMode.SELF_SIGNED, authorities="a CA", has_metrics=True)
    template = _template(part, tls=tls)
    monitor = f"updraft-{'inference' if part == 'vllm' else part}"
    (endpoint,) = one(rendered("monitoring"), "PodMonitor", monitor)["spec"]["podMetricsEndpoints"]
    kept = next(one for one in endpoint["relabelings"] if one.get("action") == "keep")
    scheme = next(one for one in endpoint["relabelings"] if one.get("targetLabel") == "__scheme__")
    containers = [*template["spec"]["containers"], *template["spec"].get("initContainers", ())]
    ports = [port["name"] for container in containers for port in container.get("ports", ())]
    scraped = [port for port in ports if re.fullmatch(kept["regex"], port)]
    assert scraped
    for name in scraped:
        is_plain = name == "http"  # the clients' port, without a certificate of the user's
        assert bool(re.fullmatch(scheme["regex"], name)) is not is_plain
    assert scheme["replacement"] == "https"
    assert endpoint["tlsConfig"] == {"insecureSkipVerify": True}


def test_the_operators_probes_and_monitor_follow_its_tls() -> None:
    monitored = rendered("cert-manager", "--api-versions", "monitoring.coreos.com/v1")
    (container,) = one(monitored, "Deployment", "updraft-operator")["spec"]["template"]["spec"]["containers"]
    probes = [container[f"{kind}Probe"]["httpGet"]["scheme"] for kind in ("startup", "readiness", "liveness")]
    assert probes == ["HTTPS"] * 3
    (endpoint,) = one(monitored, "ServiceMonitor", "updraft-operator")["spec"]["endpoints"]
    assert (endpoint["scheme"], endpoint["tlsConfig"]) == ("https", {"insecureSkipVerify": True})
    (plain,) = one(rendered("monitoring"), "ServiceMonitor", "updraft-operator")["spec"]["endpoints"]
    assert "scheme" not in plain


def test_the_token_of_the_operators_metrics_is_mounted_and_sent() -> None:
    monitored = rendered("cert-manager", "--api-versions", "monitoring.coreos.com/v1")
    pod = one(monitored, "Deployment", "updraft-operator")["spec"]["template"]["spec"]
    (volume,) = (each for each in pod["volumes"] if each["name"] == "metrics-token")
    assert volume["secret"] == {"secretName": "metrics-token", "items": [{"key": "token", "path": "token"}]}
    env = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "metrics-token")
    assert env["UPDRAFT_OPERATOR_METRICS_TOKEN_FILE"] == f"{mount['mountPath']}/token"
    (endpoint,) = one(monitored, "ServiceMonitor", "updraft-operator")["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "metrics-token", "key": "token"}}


def _template(part: str, tls: Tls | None = None) -> Any:
    ranks = Trainer(accelerator=TrainerAccelerator(per_pod=3))
    engine = Engine(type=EngineType.VLLM if part == "vllm" else EngineType.TORCH)
    spec = Spec(target_model=TargetModel(uri="/models/any"), trainer=ranks, engine=engine)
    owner = AdaptiveSpeculator(metadata=Metadata(name="chat", namespace="team"), spec=spec)
    images = Images(inference="i:1", trainer="t:1", registry="r:1", operator="o:1", sglang="s:1", vllm="v:1")
    config = OperatorConfig(images=images, namespace="updraft-system", has_redis=True, tls=tls or Tls())
    built = {"inference": serving, "vllm": serving, "trainer": trainer, "registry": registry}[part].objects(
        owner, config
    )
    (workload,) = [each for each in built if each["kind"] in {"Deployment", "StatefulSet"}]
    return workload["spec"]["template"]


def test_monitors_look_where_the_operator_works() -> None:
    def places(case: str) -> list[object]:
        return [monitor["spec"]["namespaceSelector"] for monitor in of_kind(rendered(case), "PodMonitor")]

    assert places("monitoring") == [{"any": True}] * 3
    assert places("everything") == [{"matchNames": ["team-a", "team-b"]}] * 3


def test_monitoring_comes_where_the_prometheus_operator_is() -> None:
    kinds = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
    with_it = rendered("default", "--api-versions", "monitoring.coreos.com/v1")

    assert {document["kind"] for document in with_it} & kinds == kinds
    assert {document["kind"] for document in rendered("default")} & kinds == set()
    assert {
        document["kind"] for document in rendered("small", "--api-versions", "monitoring.coreos.com/v1")
    } & kinds == set()


def test_what_a_prometheus_selects_by_is_on_every_monitor() -> None:
    for document in of_kind(rendered("everything"), "ServiceMonitor", "PodMonitor", "PrometheusRule"):
        assert document["metadata"]["labels"]["release"] == "prometheus", title(document)


def test_the_operator_knows_who_may_scrape_the_pods_of_resources() -> None:
    def peers(case: str) -> str | None:
        (deployment,) = of_kind(rendered(case), "Deployment")
        env = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
        return next((each["value"] for each in env if each["name"] == "UPDRAFT_OPERATOR_METRICS_FROM"), None)

    given = settings.load(OperatorSettings, {"UPDRAFT_OPERATOR_METRICS_FROM": peers("everything") or ""})
    (peer,) = given.config.metrics_from
    assert peer in [each for policy in of_kind(rendered("everything"), "NetworkPolicy") for each in _peers(policy)]
    assert peers("default") is None


def _peers(policy: Any) -> list[Any]:
    return [peer for rule in policy["spec"]["ingress"] for peer in rule.get("from", ())]

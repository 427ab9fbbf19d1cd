"""Metrics with TLS, where an installation asks for it: certificates, ports, probes and settings follow together."""

import ssl
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.support.manifests import ATTACHED, CONFIG, built, container, named, one, pod_spec, speculator
from tests.unit.operator.test_moves import lives
from tests.unit.operator.world import KEY, World, run_now

from updraft_chassis import metrics as port
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.tls.terms import Tls, TlsMode
from updraft_operator.watching.x509 import own_context

ASKED = replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED, authorities="a CA\n", has_metrics=True))
FOLDER = "/etc/updraft/metrics-tls"
SERVER = {"engine": {"type": "VLLM"}}


def _container(part: str, name: str, spec: dict[str, Any], config: OperatorConfig = ASKED) -> dict[str, Any]:
    return container(pod_spec(speculator(spec), part, config), name)


@pytest.mark.parametrize(
    ("part", "name", "spec"),
    [("trainer", "trainer", {}), ("registry", "registry", {}), ("serving", "inference", SERVER)],
)
def test_the_port_has_another_name_and_probes_follow(part: str, name: str, spec: dict[str, Any]) -> None:
    made = _container(part, name, spec)
    assert [each["name"] for each in made["ports"] if "metrics" in each["name"]] == ["tls-metrics"]
    probes = [probe["httpGet"] for key, probe in made.items() if key.endswith("Probe")]
    assert {(probe["port"], probe["scheme"]) for probe in probes} == {("tls-metrics", "HTTPS")}


@pytest.mark.parametrize(("part", "name", "spec"), [("trainer", "trainer", {}), ("serving", "inference", SERVER)])
def test_trainers_and_agents_mount_a_certificate_that_is_not_the_registrys(
    part: str, name: str, spec: dict[str, Any]
) -> None:
    volume = named(pod_spec(speculator(spec), part, ASKED)["volumes"])["updraft-metrics-tls"]["secret"]
    assert volume["secretName"] == "qwen-metrics-tls"
    assert FOLDER in [mount["mountPath"] for mount in _container(part, name, spec)["volumeMounts"]]
    data = one(built(speculator(spec), ASKED), "ConfigMap", f"qwen-{part}")["data"]
    assert [value for key, value in data.items() if "METRICS_TLS" in key] == [f"{FOLDER}/tls.crt", f"{FOLDER}/tls.key"]


def test_the_registry_uses_its_own_certificate() -> None:
    data = one(built(speculator(), ASKED), "ConfigMap", "qwen-registry")["data"]
    assert data["UPDRAFT_REGISTRY_METRICS_TLS"] == "true"


def test_ports_of_ranks_have_names_that_kubernetes_takes() -> None:
    spec = {"trainer": {"accelerator": {"perPod": 16}}}
    names = [each["name"] for each in _container("trainer", "trainer", spec)["ports"]]
    assert names[:2] == ["tls-metrics", "tls-metrics-1"]
    assert max(map(len, names)) <= 15


def test_engine_torch_and_attached_pods_have_none() -> None:
    assert "metrics-tls" not in str(pod_spec(speculator(), "serving", ASKED))
    assert "metrics-tls" not in str(built(speculator(ATTACHED), ASKED)[-2:]), "they start without objects of ours"


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, tls=Tls(mode=TlsMode.DISABLED, has_metrics=True))])
def test_without_tls_nothing_of_it_is_there(config: OperatorConfig) -> None:
    assert "tls" not in str(built(speculator(SERVER), config)).lower()


def test_the_operator_makes_and_renews_the_certificate() -> None:
    world = World(replace(ASKED, tls=replace(ASKED.tls, authorities="")))
    run_now(world.certificates.refresh())
    lives(world)
    first = world.cluster.objects["Secret", KEY.namespace, "qwen-metrics-tls"]["data"]["tls.crt"]
    world.clock.advance(ASKED.tls.lives.certificate_s * 0.7)
    lives(world)
    assert world.cluster.objects["Secret", KEY.namespace, "qwen-metrics-tls"]["data"]["tls.crt"] != first


def test_the_operators_own_port_has_a_certificate_without_a_file() -> None:
    tls = own_context("updraft-operator", time.time())
    registry = CollectorRegistry()
    with port.serve(registry, host="127.0.0.1", port=0, ready=lambda: True, setting="X", tls=tls) as number:
        shown = ssl.get_server_certificate(("127.0.0.1", number), timeout=30)
    assert "BEGIN CERTIFICATE" in shown
    assert not any(thread.name == "metrics" for thread in threading.enumerate())

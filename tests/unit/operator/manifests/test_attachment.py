"""Additions to pods of another workload; nothing of ours runs or guards these pods."""

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.support.manifests import ATTACHED, CONFIG, built, named, one, speculator

from updraft_operator.api import names
from updraft_operator.manifests import accounts
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.merge import merged
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.servers import attachment
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import Tls, TlsMode

SELF_SIGNED = replace(CONFIG, tls=Tls(mode=TlsMode.SELF_SIGNED))


def _owner(uri: str = "pvc://models/qwen", **spec: Any) -> Any:
    return speculator(merged(ATTACHED, spec), uri=uri)


def _addition(**more: Any) -> dict[str, Any]:
    return attachment.addition_of(_owner(**more), CONFIG, {})


def _init(spec: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(named(spec["initContainers"])[name])


def test_pods_of_another_workload_get_no_object_that_runs_routes_to_or_guards_them() -> None:
    serving = [each for each in built(_owner()) if each["metadata"]["labels"][names.COMPONENT] == names.SERVING]

    assert [(each["kind"], each["metadata"]["name"]) for each in serving] == [
        ("ConfigMap", "qwen-serving"),
        ("ConfigMap", "qwen-attach"),
    ]
    accounts_of = [each["metadata"]["name"] for each in accounts.objects(_owner())]
    assert "qwen-serving" not in accounts_of
    assert {"Deployment", "StatefulSet"} <= {each["kind"] for each in built(_owner())}, (
        "trainer and registry are as ever"
    )


def test_the_registry_takes_reports_of_the_workloads_account_and_lets_its_pods_in() -> None:
    owner = _owner(serving={"attached": {"serviceAccountName": "vllm"}})
    objects = built(owner)

    roles = one(objects, "ConfigMap", "qwen-registry")["data"]["UPDRAFT_REGISTRY_ACCOUNTS"].split(",")
    assert "serve@qwen:team/vllm" in roles
    (rule, _) = one(objects, "NetworkPolicy", "qwen-registry")["spec"]["ingress"]
    assert {"podSelector": {"matchLabels": {names.ATTACH: "qwen"}}} in rule["from"]
    (managed, _) = one(built(speculator()), "NetworkPolicy", "qwen-registry")["spec"]["ingress"]
    assert len(managed["from"]) == len(rule["from"]) - 1


def test_the_addition_is_an_agent_beside_the_server_and_the_plugin_in_it() -> None:
    addition = _addition()
    spec = addition["spec"]

    assert addition["metadata"]["labels"] == {names.ATTACH: "qwen"}
    assert [each["name"] for each in spec["initContainers"]] == ["updraft-prepare", "updraft-agent"]
    agent = _init(spec, "updraft-agent")
    assert (agent["restartPolicy"], agent["args"]) == ("Always", ["--engine", "vllm"])
    assert [each for each in agent if each.endswith("Probe")] == ["livenessProbe"], "its troubles are not the server's"
    assert agent["livenessProbe"]["httpGet"]["port"] == agent["ports"][0]["containerPort"]
    server = attachment.server_addition(_owner())
    variables = {each["name"]: each["value"] for each in server["env"]}
    assert variables == {
        "PYTHONPATH": "/var/lib/updraft/server/plugin",
        "UPDRAFT_VLLM_SOCKET": "/var/lib/updraft/server/tap.sock",
    }
    (mount,) = server["volumeMounts"]
    assert mount in agent["volumeMounts"]


def test_no_name_of_the_addition_can_be_one_of_the_pods_own() -> None:
    spec = attachment.addition_of(_owner(uri="hf://org/qwen"), SELF_SIGNED, {})["spec"]
    ports = [port for each in spec["initContainers"] for port in each.get("ports", ())]

    for entry in (*spec["initContainers"], *spec["volumes"], *ports):
        assert entry["name"].startswith("updraft-")
        assert len(entry["name"]) <= 15, "the limit of a port's name"
    used = {mount["name"] for each in spec["initContainers"] for mount in each["volumeMounts"]}
    assert used == named(spec["volumes"]).keys()


def test_an_attached_pod_starts_without_any_object_of_ours() -> None:
    """Its workload outlives the AdaptiveSpeculator, and a kubelet starts no container that refers to what is missing."""
    owner = _owner(uri="hf://org/qwen", targetModel={"secretRef": {"name": "hugging-face"}})
    spec = attachment.addition_of(owner, SELF_SIGNED, {})["spec"]
    (source,) = _init(spec, "updraft-model")["envFrom"]
    assert source == {"secretRef": {"name": "hugging-face", "optional": True}}
    assert named(spec["volumes"])["updraft-ca"]["configMap"]["optional"] is True
    for each in spec["initContainers"]:
        assert all(kind["optional"] for source in each.get("envFrom", ()) for kind in source.values())
        references = (variable.get("valueFrom", {}) for variable in each["env"])
        kinds = ("secretKeyRef", "configMapKeyRef")
        assert all(source[kind]["optional"] for source in references for kind in kinds if kind in source)


def test_agents_reach_a_registry_with_tls_by_the_name_in_its_certificate_and_trust_its_authority() -> None:
    owner = _owner()
    settings = one(built(owner, SELF_SIGNED), "ConfigMap", "qwen-serving")["data"]
    spec = attachment.addition_of(owner, SELF_SIGNED, settings)["spec"]

    assert settings["UPDRAFT_INFERENCE_REGISTRY_ADDRESS"] == f"{tls.registry_host(owner)}:50051"
    (mount,) = (each for each in _init(spec, "updraft-agent")["volumeMounts"] if each["name"] == "updraft-ca")
    assert settings["UPDRAFT_INFERENCE_REGISTRY_CA_FILE"].startswith(f"{mount['mountPath']}/")
    assert named(spec["volumes"])["updraft-ca"]["configMap"]["name"] == tls.ca_name("qwen")


def test_containers_of_the_addition_run_as_the_pods_user_and_can_read_their_token() -> None:
    """An agent with a user of its own could not share its socket with the server."""
    spec = _addition()["spec"]

    for each in spec["initContainers"]:
        assert not {"runAsUser", "runAsGroup", "runAsNonRoot"} & each["securityContext"].keys()
    assert named(spec["volumes"])["updraft-access"]["projected"]["defaultMode"] == 0o444


def test_only_what_the_agent_reads_of_a_model_is_downloaded() -> None:
    download = _init(_addition(uri="hf://org/qwen")["spec"], "updraft-model")

    assert download["command"][-1] == "--head-only"


@pytest.mark.parametrize("engine", ["VLLM", "SGLang"])
def test_the_arguments_are_those_of_a_managed_server(engine: str) -> None:
    managed = speculator({"engine": {"type": engine}}, uri="pvc://models/qwen")
    (server,) = one(built(managed), "Deployment", "qwen-serving")["spec"]["template"]["spec"]["containers"]
    given = attachment.arguments(_owner(engine={"type": engine}))

    words = [part for word in given for part in word.split("=", maxsplit=1)]
    assert " ".join(words) in " ".join(server["args"])


def test_only_an_agent_of_several_sglang_ranks_calls_the_server_and_has_its_admin_key() -> None:
    one_rank, several = _owner(engine={"type": "SGLang"}), _owner(engine={"type": "SGLang", "tensorParallelSize": 2})
    agents = [
        _init(attachment.addition_of(owner, CONFIG, {})["spec"], "updraft-agent") for owner in (one_rank, several)
    ]

    assert agents[0]["args"] == ["--engine", "sglang"]
    assert agents[1]["args"][-2:] == ["--attach", "http://127.0.0.1:30000"]
    elsewhere = _owner(engine={"type": "SGLang", "tensorParallelSize": 2}, serving={"attached": {"port": 8000}})
    agent = _init(attachment.addition_of(elsewhere, CONFIG, {})["spec"], "updraft-agent")
    assert agent["args"][-1] == "http://127.0.0.1:8000"
    assert [("--config" in attachment.arguments(owner)) for owner in (one_rank, several)] == [False, True]


def test_a_quota_can_be_kept_because_every_added_container_has_the_same_chosen_resources() -> None:
    chosen = {"limits": {"cpu": "1", "memory": "3Gi"}}
    with_limits = _owner(uri="hf://org/qwen", serving={"attached": {"resources": chosen}})

    for each in attachment.addition_of(with_limits, CONFIG, {})["spec"]["initContainers"]:
        assert each["resources"] == chosen
    for each in _addition(uri="hf://org/qwen")["spec"]["initContainers"]:
        assert each["resources"]["requests"].keys() == {"cpu", "memory"}


def test_the_description_for_people_and_tools_is_complete_and_marked() -> None:
    owner = _owner(serving={"attached": {"container": "main"}})
    data = one(built(owner), "ConfigMap", "qwen-attach")["data"]

    settings = one(built(owner), "ConfigMap", "qwen-serving")["data"]
    assert json.loads(data[attachment.POD]) == attachment.addition_of(owner, CONFIG, settings)
    assert json.loads(data[attachment.SERVER]) == attachment.server_addition(owner)
    assert data[attachment.CONTAINER] == "main"


def test_the_mark_of_a_pod_tells_a_change_of_what_its_agent_reads_from_one_of_what_is_added() -> None:
    before, password = _marks(_owner()), replace(CONFIG, redis_marks={Role.WRITER: "another"})

    for other in (_marks(_owner(traces={"capture": "OptIn"})), _marks(_owner(), password)):
        assert (other[0] != before[0], other[1] == before[1]) == (True, True)
    newer = _marks(_owner(draft={"lookahead": 5}))
    assert (newer[0] == before[0], newer[1] != before[1]) == (True, True)


def _marks(owner: Any, config: OperatorConfig = CONFIG) -> list[str]:
    return attachment.settings_mark(one(built(owner, config), "ConfigMap", "qwen-attach")["data"]).split("-")


@pytest.mark.parametrize(
    ("containers", "chosen", "found"),
    [
        (["vllm-openai"], None, "vllm-openai"),
        (["proxy", "main"], None, "main"),
        (["proxy", "server"], None, ""),
        (["proxy", "server"], "server", "server"),
        (["proxy", "main"], "server", ""),
    ],
)
def test_the_servers_container_is_the_named_one_the_only_one_or_one_with_a_usual_name(
    containers: list[str], chosen: str | None, found: str
) -> None:
    assert attachment.server_container([{"name": name} for name in containers], chosen) == found

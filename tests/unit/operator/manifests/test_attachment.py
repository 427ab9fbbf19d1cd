"""What is added to pods of another workload, and that nothing of ours runs or guards them."""

import json
from typing import Any

import pytest
from tests.support.manifests import ATTACHED, CONFIG, built, named, one, speculator

from updraft_operator.api import names
from updraft_operator.manifests import accounts
from updraft_operator.manifests.merge import merged
from updraft_operator.manifests.servers import attachment


def _owner(uri: str = "pvc://models/qwen", **spec: Any) -> Any:
    return speculator(merged(ATTACHED, spec), uri=uri)


def _addition(**more: Any) -> dict[str, Any]:
    return attachment.addition_of(_owner(**more), CONFIG)


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
    assert "serve:team/vllm" in roles
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
    spec = _addition(uri="hf://org/qwen")["spec"]
    ports = [port for each in spec["initContainers"] for port in each.get("ports", ())]

    for entry in (*spec["initContainers"], *spec["volumes"], *ports):
        assert entry["name"].startswith("updraft-")
        assert len(entry["name"]) <= 15, "the limit of a port's name"
    used = {mount["name"] for each in spec["initContainers"] for mount in each["volumeMounts"]}
    assert used == named(spec["volumes"]).keys()


def test_an_attached_pod_starts_without_any_object_of_ours() -> None:
    """Its workload outlives the AdaptiveSpeculator, and a kubelet starts no container that refers to what is missing."""
    for each in _addition()["spec"]["initContainers"]:
        assert all(source["configMapRef"]["optional"] for source in each.get("envFrom", ()))
        references = (variable.get("valueFrom", {}) for variable in each["env"])
        kinds = ("secretKeyRef", "configMapKeyRef")
        assert all(source[kind]["optional"] for source in references for kind in kinds if kind in source)


def test_containers_of_the_addition_run_as_the_pods_user_and_can_read_their_token() -> None:
    """An agent with a user of its own could not share its socket with the server."""
    spec = _addition()["spec"]

    for each in spec["initContainers"]:
        assert not {"runAsUser", "runAsGroup", "runAsNonRoot"} & each["securityContext"].keys()
    assert named(spec["volumes"])["updraft-access"]["projected"]["defaultMode"] == 0o444


def test_only_what_the_agent_reads_of_a_model_is_downloaded() -> None:
    download = _init(_addition(uri="hf://org/qwen")["spec"], "updraft-model")

    assert download["command"][-1] == "--head-only"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_arguments_are_those_of_a_managed_server(engine: str) -> None:
    managed = speculator({"engine": engine}, uri="pvc://models/qwen")
    (server,) = one(built(managed), "Deployment", "qwen-serving")["spec"]["template"]["spec"]["containers"]
    given = attachment.arguments(_owner(engine=engine))

    words = [part for word in given for part in word.split("=", maxsplit=1)]
    assert " ".join(words) in " ".join(server["args"])


def test_only_an_agent_of_several_sglang_ranks_calls_the_server_and_has_its_admin_key() -> None:
    one_rank, several = _owner(engine="sglang"), _owner(engine="sglang", serving={"tensorParallelSize": 2})
    agents = [_init(attachment.addition_of(owner, CONFIG)["spec"], "updraft-agent") for owner in (one_rank, several)]

    assert [("--attach" in each["args"]) for each in agents] == [False, True]
    assert [("--config" in attachment.arguments(owner)) for owner in (one_rank, several)] == [False, True]


def test_the_description_for_people_and_tools_is_complete_and_marked() -> None:
    owner = _owner(serving={"attached": {"container": "main"}})
    data = one(built(owner), "ConfigMap", "qwen-attach")["data"]

    assert json.loads(data[attachment.POD]) == attachment.addition_of(owner, CONFIG)
    assert json.loads(data[attachment.SERVER]) == attachment.server_addition(owner)
    assert data[attachment.CONTAINER] == "main"
    mark = json.loads(data[attachment.POD])["metadata"]["annotations"][names.SETTINGS]
    assert mark == attachment.settings_mark(owner, CONFIG)
    assert mark != attachment.settings_mark(_owner(draft={"lookahead": 5}), CONFIG)


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

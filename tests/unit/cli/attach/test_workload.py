"""A workload of somebody's, with the operator's own description of what its pods need."""

import shlex
from copy import deepcopy
from typing import Any

import pytest
import yaml
from tests.support.manifests import ATTACHED, built, one, speculator

from updraft_chassis.errors import InvalidInput
from updraft_cli.attach.workload import USUAL_NAMES, Addition, inference_service_config, kustomization, patch, warning
from updraft_operator.manifests.merge import merged
from updraft_operator.manifests.servers import attachment

PLUGIN = "/var/lib/updraft/server/plugin"


def addition(**spec: Any) -> Addition:
    owner = speculator(merged(ATTACHED, spec), uri="pvc://models/qwen")
    return Addition.of(one(built(owner), "ConfigMap", "qwen-attach")["data"])


def deployment(*containers: dict[str, Any], **server: Any) -> dict[str, Any]:
    own = {"name": "vllm", "image": "vllm/vllm-openai", "args": ["--model", "qwen"], **server}
    spec = {"template": {"metadata": {"labels": {"app": "vllm"}}, "spec": {"containers": [own, *containers]}}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "chat"}, "spec": spec}


def changed(workload: dict[str, Any], made: Addition | None = None) -> dict[str, Any]:
    """The container that the patch is about."""
    (container,) = patch(made or addition(), workload)["spec"]["template"]["spec"]["containers"]
    return dict(container)


def applied(workload: dict[str, Any]) -> dict[str, Any]:
    """As the API server merges it."""
    return merged(workload, patch(addition(), workload))


def test_the_patch_names_the_servers_container_and_keeps_its_arguments() -> None:
    made = patch(addition(), deployment({"name": "proxy"}))["spec"]["template"]
    (server,) = made["spec"]["containers"]

    assert server["name"] == "vllm"
    assert server["args"][:2] == ["--model", "qwen"]
    assert server["args"][2].startswith('--speculative-config={"method": "eagle3"')
    assert made["metadata"]["labels"] == {"updraft.dev/attach": "qwen"}
    assert [each["name"] for each in made["spec"]["initContainers"]] == ["updraft-prepare", "updraft-agent"]


def test_the_plugins_folder_goes_before_the_path_that_a_server_has() -> None:
    theirs = [{"name": "PYTHONPATH", "value": "/own:/more"}, {"name": "A", "value": "1"}]
    variables = {each["name"]: each["value"] for each in changed(deployment(env=theirs))["env"]}

    assert variables["PYTHONPATH"] == f"{PLUGIN}:/own:/more"
    assert "A" not in variables, "it is the workload's own"
    with pytest.raises(InvalidInput, match="PYTHONPATH of container vllm comes from elsewhere"):
        changed(deployment(env=[{"name": "PYTHONPATH", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "b"}}}]))


def test_attaching_twice_changes_nothing_more() -> None:
    once = applied(deployment(env=[{"name": "PYTHONPATH", "value": "/own"}]))

    assert applied(deepcopy(once)) == once
    fewer = merged(once, patch(addition(draft={"lookahead": 5}), once))
    (server,) = fewer["spec"]["template"]["spec"]["containers"]
    assert [word.partition("=")[0] for word in server["args"]] == ["--model", "qwen", "--speculative-config"]
    assert '"num_speculative_tokens": 5' in server["args"][-1]


def test_sglang_gets_its_options_once_too() -> None:
    made, workload = addition(engine={"type": "SGLang"}), deployment()
    once = merged(workload, patch(made, workload))
    twice = merged(once, patch(made, once))

    (server,) = twice["spec"]["template"]["spec"]["containers"]
    assert server["args"].count("--speculative-algorithm") == 1
    assert twice == once


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_attaching_again_for_other_ranks_takes_away_all_and_only_what_was_added(before: int, after: int) -> None:
    """Somebody has added options after ours meanwhile."""
    first, again = (addition(engine={"type": "SGLang", "tensorParallelSize": ranks}) for ranks in (before, after))
    once = changed(deployment(), first)["args"]

    twice = changed(deployment(args=[*once, "--mem-fraction-static", "0.8"]), again)["args"]

    own = ["--model", "qwen", "--mem-fraction-static", "0.8"]
    assert twice == [*own, *again.server["args"]]


def test_speculation_of_the_workloads_own_is_refused() -> None:
    for own in (
        {"args": ["--speculative-config", "{}"]},
        {"command": ["vllm", "serve", "--speculative-config={}"]},
        {"args": ["--speculative_config={}"]},
        {"args": ["-sc", "{}"]},
        {"args": ["--speculative-config.method", "ngram"]},
    ):
        with pytest.raises(InvalidInput, match=r"container vllm has its own .*; remove it"):
            changed(deployment(**own))


@pytest.mark.parametrize("own", [["--config", "/etc/own.yaml"], ["--config=/etc/own.yaml"]])
def test_a_second_config_file_is_refused_where_ours_is_needed(own: list[str]) -> None:
    """SGLang reads one."""
    with pytest.raises(InvalidInput, match="container vllm has its own --config"):
        changed(deployment(args=own), addition(engine={"type": "SGLang", "tensorParallelSize": 2}))
    assert changed(deployment(args=own), addition(engine={"type": "SGLang"}))["args"][: len(own)] == own


def test_what_is_added_runs_as_the_user_of_the_servers_container() -> None:
    context = {"runAsUser": 1000, "runAsGroup": 1000, "privileged": True}
    inits = patch(addition(), deployment(securityContext=context))["spec"]["template"]["spec"]["initContainers"]

    for each in inits:
        assert (each["securityContext"]["runAsUser"], each["securityContext"]["runAsGroup"]) == (1000, 1000)
        assert "privileged" not in each["securityContext"]


def test_a_path_that_the_workload_does_not_show_is_warned_of() -> None:
    assert "image of container vllm or its envFrom sets PYTHONPATH" in warning(addition(), deployment())
    assert warning(addition(), deployment(env=[{"name": "PYTHONPATH", "value": "/own"}])) == ""


def test_workers_without_a_server_are_left_alone() -> None:
    group = deployment()
    templates = {"size": 2, "workerTemplate": group["spec"]["template"]}
    group = {**group, "kind": "LeaderWorkerSet", "spec": {"leaderWorkerTemplate": templates}}

    with pytest.raises(InvalidInput, match="give the LeaderWorkerSet a leaderTemplate"):
        patch(addition(), group)


def test_a_script_is_refused_with_the_words_to_add_and_accepted_once_it_has_them() -> None:
    command = ["/bin/bash", "-c"]
    with pytest.raises(InvalidInput, match="add to its server's arguments: '--speculative-config=") as refused:
        changed(deployment(command=command, args=["exec vllm serve qwen"]))
    words = str(refused.value).rpartition("arguments: ")[2]
    assert shlex.split(words) == addition().server["args"]

    assert "args" not in changed(deployment(command=command, args=[f"exec vllm serve qwen {words}"]))


def test_an_unknown_server_is_refused_with_the_containers_that_there_are() -> None:
    with pytest.raises(InvalidInput, match=r"the workload has several containers; name the server's .* it has a, b"):
        patch(addition(), deployment({"name": "b"}, name="a"))
    named = addition(serving={"attached": {"container": "server"}})
    with pytest.raises(InvalidInput, match=r"no container server; .* it has vllm"):
        patch(named, deployment())
    assert changed(deployment({"name": "proxy"}, name="server"), named)["name"] == "server"
    assert [attachment.server_container([{"name": "x"}, {"name": name}], None) for name in USUAL_NAMES] == list(
        USUAL_NAMES
    )


def test_the_kustomize_component_appends_arguments_to_those_of_the_base() -> None:
    component = kustomization(addition(), deployment({"name": "proxy"}))
    whole, operations = (yaml.safe_load(each["patch"]) for each in component["patches"])

    assert {each["target"]["name"] for each in component["patches"]} == {"chat"}
    assert "args" not in whole["spec"]["template"]["spec"]["containers"][0]
    (operation,) = operations
    assert (operation["op"], operation["path"]) == ("add", "/spec/template/spec/containers/0/args/-")
    assert operation["value"] == addition().server["args"][0]
    without = yaml.safe_load(kustomization(addition(), deployment(args=None))["patches"][1]["patch"])
    assert without == [
        {"op": "add", "path": "/spec/template/spec/containers/0/args", "value": addition().server["args"]}
    ]


@pytest.mark.parametrize("has_leader", [True, False])
def test_of_a_group_of_pods_the_leader_is_changed_with_whole_lists(*, has_leader: bool) -> None:
    """A patch of a custom resource replaces lists."""
    mounts = [{"name": "a", "mountPath": "/a"}, {"name": "a", "mountPath": "/b", "subPath": "b"}]
    own = {"name": "main", "image": "vllm", "args": ["--model", "qwen"], "env": [{"name": "A", "value": "1"}]}
    spec = {"containers": [{**own, "volumeMounts": mounts}, {"name": "proxy"}], "volumes": [{"name": "a"}]}
    templates = {"leaderTemplate": {"spec": spec}, "workerTemplate": {"spec": {"containers": [{"name": "worker"}]}}}
    if not has_leader:
        templates = {"workerTemplate": {"spec": spec}}
    group = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "chat"},
        "spec": {"leaderWorkerTemplate": templates},
    }

    made = patch(addition(), group)["spec"]["leaderWorkerTemplate"]

    assert list(made) == ["leaderTemplate" if has_leader else "workerTemplate"]
    (template,) = made.values()
    main, proxy = template["spec"]["containers"]
    assert (main["image"], proxy) == ("vllm", {"name": "proxy"})
    assert [each["name"] for each in main["env"]] == ["A", "PYTHONPATH", "UPDRAFT_VLLM_SOCKET"]
    assert [each["mountPath"] for each in main["volumeMounts"]] == ["/a", "/b", "/var/lib/updraft"]
    assert template["spec"]["volumes"][0] == {"name": "a"}
    assert len(kustomization(addition(), group)["patches"]) == 1


def test_a_kserve_config_passes_arguments_by_the_variable_that_its_templates_read() -> None:
    config = inference_service_config(addition(), "qwen")
    (server,) = config["spec"]["template"]["containers"]
    variables = {each["name"]: each["value"] for each in server["env"]}

    assert (config["kind"], config["metadata"]["name"], server["name"]) == (
        "LLMInferenceServiceConfig",
        "qwen-attach",
        "main",
    )
    assert shlex.split(variables["VLLM_ADDITIONAL_ARGS"]) == addition().server["args"]
    assert config["spec"]["labels"] == {"updraft.dev/attach": "qwen"}
    with pytest.raises(InvalidInput, match="is for engine VLLM"):
        inference_service_config(addition(engine={"type": "SGLang"}), "qwen")


def test_the_description_of_another_release_is_refused_with_a_sentence() -> None:
    with pytest.raises(InvalidInput, match="use the kubectl plugin of the operator's release"):
        Addition.of({"pod": "{}"})

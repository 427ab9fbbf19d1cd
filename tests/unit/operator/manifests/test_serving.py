"""The inference pods: both engines, how they are replaced, and how many there are."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.support.manifests import CONFIG, built, container, named, one, pod_spec, speculator

from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests import serving
from updraft_operator.manifests.manifest import Manifest


def _deployment(spec: dict[str, Any], *, sets_replicas: bool = True) -> Manifest:
    return one(serving.objects(speculator(spec), CONFIG, sets_replicas=sets_replicas), "Deployment", "qwen-serving")


def _strategy(spec: dict[str, Any]) -> tuple[Any, Any]:
    strategy = _deployment(spec)["spec"]["strategy"]["rollingUpdate"]
    return strategy["maxSurge"], strategy["maxUnavailable"]


def _argument(made: dict[str, Any], name: str) -> str:
    return str(made["args"][made["args"].index(name) + 1])


def test_engine_torch_is_one_container() -> None:
    pod = pod_spec(speculator(), "serving")
    assert [each["name"] for each in pod["containers"]] == ["inference"]
    assert container(pod, "inference")["image"] == "inference:1"


@pytest.mark.parametrize("engine", ["torch", "sglang"])
def test_the_documented_way_to_api_keys_mounts_them_beside_what_is_ours(engine: str) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", Path("docs/openai.md").read_text(), re.DOTALL)
    documented = {"engine": engine, **yaml.safe_load(example)["spec"]}
    pod, before = (
        pod_spec(speculator(spec, uri="hf://org/qwen"), "serving") for spec in (documented, {"engine": engine})
    )
    ours, made = container(before, "inference"), container(pod, "inference")
    assert {volume["name"] for volume in pod["volumes"]} == {volume["name"] for volume in before["volumes"]} | {
        "api-keys"
    }
    assert [mount for mount in made["volumeMounts"] if mount not in ours["volumeMounts"]] == [
        {"name": "api-keys", "mountPath": "/etc/updraft/api-keys", "readOnly": True}
    ]
    assert [variable for variable in made["env"] if variable not in ours["env"]] == [
        {"name": "UPDRAFT_INFERENCE_API_KEYS_FILE", "value": "/etc/updraft/api-keys/keys"}
    ]


def test_engine_sglang_is_a_stock_server_with_the_agent_beside_it() -> None:
    spec = {"engine": "sglang", "serving": {"tensorParallelSize": 4, "args": ["--enable-x"], "image": "mine:2"}}
    pod = pod_spec(speculator(spec, uri="hf://org/qwen"), "serving")
    engine, agent = container(pod, "engine"), container(pod, "inference")
    assert (engine["image"], agent["image"]) == ("mine:2", "inference:1")
    assert _argument(engine, "--tp-size") == "4"
    assert _argument(engine, "--served-model-name") == "qwen"
    assert engine["args"][-1] == "--enable-x"
    assert named(pod["volumes"])["shm"]["emptyDir"] == {"medium": "Memory"}
    assert [port["name"] for port in agent["ports"]] == ["http"]


def test_resources_and_variables_of_sglang_are_the_engines() -> None:
    serving = {"resources": {"limits": {"nvidia.com/gpu": 1}}, "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}
    pod = pod_spec(speculator({"engine": "sglang", "serving": serving}), "serving")
    assert container(pod, "engine")["resources"] == serving["resources"]
    assert named(container(pod, "engine")["env"])["NCCL_DEBUG"]["value"] == "INFO"
    assert "resources" not in container(pod, "inference")
    assert "NCCL_DEBUG" not in named(container(pod, "inference")["env"])


def test_a_context_as_long_as_the_models_does_not_keep_sglang_from_starting() -> None:
    """The server gets some tokens more than requests may have, and ends at its start if those exceed the model's."""
    engine = container(
        pod_spec(speculator({"engine": "sglang", "serving": {"maxContextTokens": 8192}}), "serving"), "engine"
    )
    assert int(_argument(engine, "--context-length")) > 8192
    assert named(engine["env"])["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"]["value"] == "1"


def test_without_a_limit_requests_of_sglang_may_be_as_long_as_the_model_allows() -> None:
    engine = container(pod_spec(speculator({"engine": "sglang"}), "serving"), "engine")
    assert "--context-length" not in engine["args"]


@pytest.mark.parametrize("engine", ["torch", "sglang"])
def test_pods_get_a_limit_of_the_context_only_if_the_spec_has_one(engine: str) -> None:
    def limit(limits: dict[str, int]) -> str | None:
        settings = one(
            serving.objects(speculator({"engine": engine, "serving": limits}), CONFIG), "ConfigMap", "qwen-serving"
        )
        content: str | None = settings["data"].get("UPDRAFT_INFERENCE_MAX_CONTEXT")
        return content

    assert (limit({}), limit({"maxContextTokens": 4096})) == (None, "4096")


def test_the_example_for_sglang_is_the_one_of_the_page_and_gives_the_server_a_gpu() -> None:
    example = Path("examples/sglang-8b.yaml").read_text()
    assert f"```yaml\n{example}```\n" in Path("docs/sglang.md").read_text()
    shown = yaml.safe_load(example)
    AdaptiveSpeculator.model_validate(shown)
    owner = speculator(shown["spec"], uri=shown["spec"]["targetModel"]["uri"])
    engine = container(pod_spec(owner, "serving"), "engine")
    assert engine["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    assert int(_argument(engine, "--context-length")) > 32_768
    assert container(pod_spec(owner, "trainer"), "trainer")["resources"]["requests"]["memory"] == "20Gi"


def test_no_probe_of_an_engine_asks_it_for_a_token() -> None:
    engine = container(pod_spec(speculator({"engine": "sglang"}), "serving"), "engine")
    assert {engine[name]["httpGet"]["path"] for name in engine if name.endswith("Probe")} == {"/ping"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({}, (1, 0), id="torch adds one first"),
        pytest.param({"engine": "sglang"}, (0, 1), id="GPUs are scarce: one goes first"),
        pytest.param({"engine": "sglang", "serving": {"rollingUpdate": {"maxSurge": 1}}}, (1, 0), id="a spare GPU"),
        pytest.param({"engine": "sglang", "serving": {"rollingUpdate": {"maxUnavailable": 0}}}, (1, 0), id="none less"),
        pytest.param(
            {"engine": "sglang", "serving": {"rollingUpdate": {"maxUnavailable": "0%"}}}, (1, "0%"), id="0% less"
        ),
        pytest.param({"serving": {"rollingUpdate": {"maxSurge": 0}}}, (0, 1), id="torch without surge"),
        pytest.param({"serving": {"rollingUpdate": {"maxSurge": "0%"}}}, ("0%", 1), id="torch with a surge of 0%"),
        pytest.param(
            {"serving": {"rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "50%"}}}, ("25%", "50%"), id="both said"
        ),
    ],
)
def test_pods_are_replaced_as_there_is_room(spec: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert _strategy(spec) == expected


amounts = st.none() | st.integers(0, 3) | st.sampled_from(["0%", "25%", "100%"])


@given(engine=st.sampled_from(["torch", "sglang"]), surge=amounts, unavailable=amounts)
def test_one_of_surge_and_unavailable_is_always_more_than_none(engine: str, surge: Any, unavailable: Any) -> None:
    limits = {"maxSurge": surge, "maxUnavailable": unavailable}
    given_ = {name: value for name, value in limits.items() if value is not None}
    chosen = _strategy({"engine": engine, "serving": {"rollingUpdate": given_}})
    is_refused = surge in (0, "0%") and unavailable in (0, "0%")  # by a rule of the CRD
    assert is_refused or not set(chosen) <= {0, "0%"}


def test_the_number_of_pods_is_that_of_the_spec() -> None:
    assert _deployment({"serving": {"replicas": 3}})["spec"]["replicas"] == 3


def test_an_autoscaler_of_the_deployment_owns_its_number() -> None:
    assert "replicas" not in _deployment({"serving": {"replicas": 3}}, sets_replicas=False)["spec"]


def test_suspension_is_zero_pods_whoever_scales() -> None:
    assert _deployment({"suspend": True}, sets_replicas=False)["spec"]["replicas"] == 0


def test_suspension_keeps_the_registry_and_stops_serving_and_trainer() -> None:
    made = built(speculator({"suspend": True}))
    assert one(made, "Deployment", "qwen-serving")["spec"]["replicas"] == 0
    assert one(made, "Deployment", "qwen-trainer")["spec"]["replicas"] == 0
    assert one(made, "StatefulSet", "qwen-registry")["spec"]["replicas"] == 1


def test_clients_find_the_pods_at_port_80() -> None:
    (port,) = one(built(speculator()), "Service", "qwen")["spec"]["ports"]
    (http,) = container(pod_spec(speculator(), "serving"), "inference")["ports"]
    assert (port["port"], port["targetPort"]) == (80, http["name"])


def test_a_drain_may_take_all_but_one_pod() -> None:
    budget = one(built(speculator()), "PodDisruptionBudget", "qwen-serving")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


@pytest.mark.parametrize("grace_s", [10, 60, 3600])
def test_requests_end_before_the_pod_is_killed(grace_s: int) -> None:
    spec = {"serving": {"terminationGracePeriodSeconds": grace_s}}
    drain_s = float(
        one(built(speculator(spec)), "ConfigMap", "qwen-serving")["data"]["UPDRAFT_INFERENCE_DRAIN_SECONDS"]
    )
    pod = pod_spec(speculator(spec), "serving")
    pull_s = container(pod, "inference")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] == grace_s
    assert 0 < drain_s + pull_s < grace_s


@pytest.mark.parametrize("grace_s", [10, 60])
def test_sglang_outlives_the_last_request_that_the_agent_lets_in(grace_s: int) -> None:
    pod = pod_spec(speculator({"engine": "sglang", "serving": {"terminationGracePeriodSeconds": grace_s}}), "serving")
    agent_s, engine_s = (
        container(pod, name)["lifecycle"]["preStop"]["sleep"]["seconds"] for name in ("inference", "engine")
    )
    assert agent_s < engine_s < grace_s


def test_no_lookahead_means_no_drafter() -> None:
    data = one(built(speculator({"draft": {"lookahead": 0}})), "ConfigMap", "qwen-serving")["data"]
    assert data["UPDRAFT_INFERENCE_DRAFTER"] == "none"
    assert "UPDRAFT_INFERENCE_DRAFTER" not in one(built(speculator()), "ConfigMap", "qwen-serving")["data"]

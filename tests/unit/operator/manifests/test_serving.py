"""The inference pods: engine Torch, how pods of all engines are replaced, and how many there are."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.manifests import CONFIG, built, container, one, pod_spec, speculator

from updraft_operator.manifests import serving
from updraft_operator.manifests.manifest import Manifest

GPU = {"limits": {"nvidia.com/gpu": 1}}


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


def test_engine_torch_reserves_a_context_only_if_the_spec_has_a_limit() -> None:
    def limit(limits: dict[str, int]) -> str | None:
        made = one(serving.objects(speculator({"serving": limits}), CONFIG), "ConfigMap", "qwen-serving")
        content: str | None = made["data"].get("UPDRAFT_INFERENCE_MAX_CONTEXT")
        return content

    assert (limit({}), limit({"maxContextTokens": 4096})) == (None, "4096")


@pytest.mark.parametrize(
    ("resources", "device"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"limits": {"cpu": "8", "memory": "16Gi"}}, None, id="CPUs"),
        pytest.param(GPU, "cuda", id="a GPU"),
        pytest.param({"limits": {"nvidia.com/gpu.shared": "1"}}, "cuda", id="a share of one"),
        pytest.param({"limits": {"nvidia.com/mig-1g.10gb": "1"}}, "cuda", id="a part of one"),
        pytest.param({"limits": {"amd.com/gpu": 1}}, "cuda", id="another vendor's, which torch also names cuda"),
        pytest.param({"limits": {"nvidia.com/gpu": 0}}, None, id="zero GPUs"),
        pytest.param({"limits": {"vpc.amazonaws.com/efa": 1}}, None, id="another device"),
        pytest.param({"limits": {"nvidia.com/gpu": "all"}}, None, id="no number"),
        pytest.param({"limits": {"nvidia.com/gpu": "1e400"}}, None, id="no end"),
        pytest.param({"limits": ["nvidia.com/gpu"]}, None, id="no object"),
    ],
)
def test_engine_torch_serves_on_the_gpu_that_its_pod_requests(resources: dict[str, Any], device: str | None) -> None:
    data = one(built(speculator({"serving": {"resources": resources}})), "ConfigMap", "qwen-serving")["data"]
    assert data.get("UPDRAFT_INFERENCE_DEVICE") == device


def test_a_device_in_the_spec_overrides_that_of_the_resources() -> None:
    chosen = {"name": "UPDRAFT_INFERENCE_DEVICE", "value": "cpu"}
    owner = speculator({"serving": {"resources": GPU, "env": [chosen]}})
    assert chosen in container(pod_spec(owner, "serving"), "inference")["env"], "variables override a ConfigMap's"


@pytest.mark.parametrize("engine", ["SGLang", "VLLM"])
def test_the_agent_of_a_server_gets_no_device(engine: str) -> None:
    owner = speculator({"engine": {"type": engine}, "serving": {"resources": GPU}})
    data = one(built(owner), "ConfigMap", "qwen-serving")["data"]
    assert "UPDRAFT_INFERENCE_DEVICE" not in data


@pytest.mark.parametrize(("retention", "seconds"), [("90m", "5400"), ("12h", "43200"), ("30d", "2592000")])
def test_pods_and_trainer_delete_traces_at_the_same_age(retention: str, seconds: str) -> None:
    made = built(speculator({"traces": {"retention": retention}}))
    assert one(made, "ConfigMap", "qwen-serving")["data"]["UPDRAFT_INFERENCE_CAPTURE_RETENTION_SECONDS"] == seconds
    assert one(made, "ConfigMap", "qwen-trainer")["data"]["UPDRAFT_TRAINER_RETENTION_SECONDS"] == seconds


@pytest.mark.parametrize("engine", ["Torch", "SGLang", "VLLM"])
def test_an_opt_in_is_required_by_what_decides_about_capture(engine: str) -> None:
    made = built(speculator({"engine": {"type": engine}, "traces": {"capture": "OptIn"}}))
    assert one(made, "ConfigMap", "qwen-serving")["data"]["UPDRAFT_INFERENCE_CAPTURE"] == "opt-in"
    made = built(speculator({"engine": {"type": engine}}))
    assert "UPDRAFT_INFERENCE_CAPTURE" not in one(made, "ConfigMap", "qwen-serving")["data"]


def test_the_header_of_a_tenant_is_read_by_engine_torch_itself() -> None:
    made = built(speculator({"serving": {"tenantHeader": "X-Team"}}))
    assert one(made, "ConfigMap", "qwen-serving")["data"]["UPDRAFT_INFERENCE_TENANT_HEADER"] == "X-Team"


def test_api_keys_of_engine_torch_are_a_file_that_its_process_reads() -> None:
    spec = {"serving": {"apiKeysSecretRef": {"name": "clients"}, "maxRequestsPerKey": 4}}
    data = one(built(speculator(spec)), "ConfigMap", "qwen-serving")["data"]
    pod = pod_spec(speculator(spec), "serving")
    assert data["UPDRAFT_INFERENCE_API_KEYS_FILE"] == "/etc/updraft/api-keys/keys"
    assert data["UPDRAFT_INFERENCE_MAX_REQUESTS_PER_KEY"] == "4"
    assert "UPDRAFT_INFERENCE_TENANT_HEADER" not in data
    assert {"name": "api-keys", "mountPath": "/etc/updraft/api-keys", "readOnly": True} in container(pod, "inference")[
        "volumeMounts"
    ]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({}, (1, 0), id="torch adds one first"),
        pytest.param({"engine": {"type": "SGLang"}}, (0, 1), id="GPUs are scarce: one goes first"),
        pytest.param({"engine": {"type": "VLLM"}}, (0, 1), id="also with vllm"),
        pytest.param(
            {"engine": {"type": "SGLang"}, "serving": {"rollingUpdate": {"maxSurge": 1}}}, (1, 0), id="a spare GPU"
        ),
        pytest.param(
            {"engine": {"type": "SGLang"}, "serving": {"rollingUpdate": {"maxUnavailable": 0}}}, (1, 0), id="none less"
        ),
        pytest.param(
            {"engine": {"type": "SGLang"}, "serving": {"rollingUpdate": {"maxUnavailable": "0%"}}},
            (1, "0%"),
            id="0% less",
        ),
        pytest.param({"serving": {"resources": GPU}}, (0, 1), id="also with torch on a GPU"),
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


@given(engine=st.sampled_from(["Torch", "SGLang", "VLLM"]), surge=amounts, unavailable=amounts)
def test_one_of_surge_and_unavailable_is_always_more_than_none(engine: str, surge: Any, unavailable: Any) -> None:
    limits = {"maxSurge": surge, "maxUnavailable": unavailable}
    given_ = {name: value for name, value in limits.items() if value is not None}
    chosen = _strategy({"engine": {"type": engine}, "serving": {"rollingUpdate": given_}})
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


@pytest.mark.parametrize(("engine", "name"), [("Torch", "inference"), ("SGLang", "engine"), ("VLLM", "engine")])
def test_clients_find_what_generates_at_port_80(engine: str, name: str) -> None:
    owner = speculator({"engine": {"type": engine}})
    (port,) = one(built(owner), "Service", "qwen")["spec"]["ports"]
    (http,) = container(pod_spec(owner, "serving"), name)["ports"]
    assert (port["port"], port["targetPort"]) == (80, http["name"])
    rules = one(built(owner), "NetworkPolicy", "qwen-serving")["spec"]["ingress"]
    assert http["containerPort"] in [allowed["port"] for rule in rules for allowed in rule["ports"]]


def _budget(serving: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = one(built(speculator({"serving": serving})), "PodDisruptionBudget", "qwen-serving")["spec"]
    return spec


def test_a_drain_takes_a_tenth_of_the_pods_at_a_time_or_as_many_as_the_spec_allows() -> None:
    budget = _budget({"replicas": 100})
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == ("10%", "AlwaysAllow")
    assert _budget({"disruptionBudget": {"maxUnavailable": 3}})["maxUnavailable"] == 3


def _loading_s(spec: dict[str, Any]) -> tuple[int, int]:
    """Seconds that a container may take to start, and a rollout without progress."""
    deployment = _deployment(spec)["spec"]
    (probe,) = [each["startupProbe"] for each in deployment["template"]["spec"]["containers"] if "startupProbe" in each]
    return probe["periodSeconds"] * probe["failureThreshold"], deployment["progressDeadlineSeconds"]


KEYS = {"apiKeysSecretRef": {"name": "clients"}}


@pytest.mark.parametrize("serving", [{}, KEYS], ids=["open", "keys"])
@pytest.mark.parametrize("engine", ["Torch", "SGLang", "VLLM"])
def test_a_rollout_fails_ten_minutes_after_a_pod_has_to_have_loaded_its_model(
    engine: str, serving: dict[str, Any]
) -> None:
    def seconds(**more: int) -> tuple[int, int]:
        return _loading_s({"engine": {"type": engine}, "serving": {**serving, **more}})

    assert seconds() == seconds(startupSeconds=1800) == (1800, 2400)
    assert seconds(startupSeconds=5400) == (5400, 6000)
    assert seconds(startupSeconds=61)[0] in (65, 70), "never less than was asked for"


@pytest.mark.parametrize("engine", ["Torch", "SGLang", "VLLM"])
def test_the_default_startup_time_written_out_restarts_nothing(engine: str) -> None:
    without, with_it = (
        _deployment({"engine": {"type": engine}, "serving": serving}) for serving in ({}, {"startupSeconds": 1800})
    )
    assert with_it == without


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


def test_no_speculation_means_no_drafter() -> None:
    data = one(built(speculator({"draft": {"speculation": "Disabled"}})), "ConfigMap", "qwen-serving")["data"]
    assert data["UPDRAFT_INFERENCE_DRAFTER"] == "none"
    assert "UPDRAFT_INFERENCE_DRAFTER" not in one(built(speculator()), "ConfigMap", "qwen-serving")["data"]

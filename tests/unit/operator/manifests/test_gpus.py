"""The GPUs that serving pods request, and those that their engine uses."""

from typing import Any

import pytest
from tests.support.manifests import built, container, one, pod_spec, speculator

from updraft_operator.manifests.gpus import mismatch, num_devices, resources

GPU = "nvidia.com/gpu"


def _problem(serving: dict[str, Any], kind: str = "SGLang", **engine: Any) -> str:
    return mismatch(speculator({"engine": {"type": kind, **engine}, "serving": serving}).spec)


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        pytest.param({}, 1, id="one device, which may be a CPU"),
        pytest.param({GPU: 1}, 1, id="one GPU"),
        pytest.param({GPU: "4"}, 4, id="four GPUs"),
        pytest.param({GPU: 4, "rdma/hca": 8}, 4, id="with others"),
        pytest.param({GPU: 1, "nvidia.com/gpumem": 3000}, 1, id="an amount of memory is no number of GPUs"),
    ],
)
def test_as_many_gpus_as_the_engine_uses_are_accepted(limits: dict[str, Any], size: int) -> None:
    assert _problem({"resources": {"limits": limits}}, tensorParallelSize=size) == ""


@pytest.mark.parametrize(
    ("limits", "kind", "used"),
    [
        pytest.param({GPU: 2}, "SGLang", 4, id="too few"),
        pytest.param({GPU: 4}, "SGLang", 1, id="too many"),
        pytest.param({"amd.com/gpu": "2"}, "VLLM", 1, id="too many for vLLM"),
        pytest.param({GPU: 2}, "Torch", 1, id="too many for Torch"),
    ],
)
def test_another_number_of_gpus_is_refused_with_both_fields(limits: dict[str, Any], kind: str, used: int) -> None:
    (requested,) = limits.values()
    assert _problem({"resources": {"limits": limits}}, kind, tensorParallelSize=used) == (
        f"spec.engine.tensorParallelSize is {used}, but spec.serving.resources.limits request {requested} GPUs: set both to"
        " the same number (above 1 only with engine SGLang or VLLM)"
    )


@pytest.mark.parametrize(
    "resources",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"limits": {"cpu": "8"}}, id="CPUs"),
        pytest.param({"limits": {GPU: 0}, "requests": {"memory": "8Gi"}}, id="zero GPUs"),
    ],
)
def test_several_gpus_that_nothing_requests_are_refused_with_an_example(resources: dict[str, Any]) -> None:
    assert _problem({"resources": resources}, tensorParallelSize=4) == (
        "spec.engine.tensorParallelSize is 4, but spec.serving.resources.limits request no GPU: set spec.serving.accelerator"
    )


@pytest.mark.parametrize(
    "serving",
    [
        pytest.param({"resources": {"limits": {"example.com/h100": 4}}}, id="a resource of another name"),
        pytest.param({"resources": {"claims": [{"name": "gpus"}]}}, id="a resource claim"),
        pytest.param({"podTemplate": {"spec": {"containers": [{"name": "engine"}]}}}, id="the pod template"),
    ],
)
def test_gpus_that_come_in_another_way_are_not_counted(serving: dict[str, Any]) -> None:
    assert _problem(serving, tensorParallelSize=4) == ""


@pytest.mark.parametrize(
    "args",
    [["--tp-size", "4"], ["--tp=4"], ["--pp-size", "4"], ["-tp", "4"], ["--tensor-parallel-size=4"], ["--dp", "4"]],
)
def test_arguments_of_the_server_may_use_another_number_of_gpus(args: list[str]) -> None:
    serving = {"resources": {"limits": {GPU: 4}}}
    assert _problem(serving, args=args) == ""
    assert _problem(serving, args=["--mem-fraction-static", "0.8"]) != ""


@pytest.mark.parametrize("template", [{"spec": ["containers"]}, {"spec": None}])
def test_a_pod_template_that_the_api_server_will_refuse_requests_no_gpu(template: dict[str, Any]) -> None:
    assert "request no GPU" in _problem({"podTemplate": template}, tensorParallelSize=2)


@pytest.mark.parametrize(
    ("engine", "accelerator", "expected"),
    [
        pytest.param({"type": "SGLang", "tensorParallelSize": 4}, {}, {GPU: "4"}, id="as many as the engine uses"),
        pytest.param({"type": "VLLM"}, {"resourceName": "amd.com/gpu"}, {"amd.com/gpu": "1"}, id="one"),
        pytest.param({"type": "Torch"}, {}, {GPU: "1"}, id="one for Torch"),
        pytest.param(
            {"type": "SGLang", "args": ["--dp-size=2"]}, {"perPod": 2}, {GPU: "2"}, id="as many as arguments use"
        ),
        pytest.param(
            {"type": "VLLM"}, {"resourceName": "nvidia.com/mig-1g.10gb"}, {"nvidia.com/mig-1g.10gb": "1"}, id="a slice"
        ),
    ],
)
def test_a_pod_gets_the_accelerators_of_the_spec(
    engine: dict[str, Any], accelerator: dict[str, Any], expected: dict[str, str]
) -> None:
    own = {"limits": {"memory": "64Gi"}, "requests": {"cpu": "8"}}
    owner = speculator({"engine": engine, "serving": {"accelerator": accelerator, "resources": own}})
    made = container(pod_spec(owner, "serving"), "inference" if engine["type"] == "Torch" else "engine")
    assert made["resources"] == {"limits": {"memory": "64Gi", **expected}, "requests": {"cpu": "8", **expected}}
    assert made["resources"] == resources(owner.spec)
    assert mismatch(owner.spec) == ""


def test_torch_runs_on_the_accelerator_and_on_cpus_without_one() -> None:
    given = (speculator({"serving": {"accelerator": {}}}), speculator())
    data = [one(built(each), "ConfigMap", "qwen-serving")["data"] for each in given]
    assert [each.get("UPDRAFT_INFERENCE_DEVICE") for each in data] == ["cuda", None]
    assert [num_devices(each.spec) for each in given] == [1, 0]


def test_another_number_of_accelerators_than_the_engine_uses_is_refused() -> None:
    assert _problem({"accelerator": {"perPod": 8}}, tensorParallelSize=4) == (
        "spec.engine.tensorParallelSize is 4, but spec.serving.accelerator.perPod is 8: leave perPod out to get as many as"
        " are used"
    )


def test_gpus_are_requested_in_one_place() -> None:
    assert _problem({"accelerator": {}, "resources": {"limits": {GPU: 1}}}) == (
        "spec.serving.resources.limits and spec.serving.accelerator both request GPUs: remove them from resources"
    )

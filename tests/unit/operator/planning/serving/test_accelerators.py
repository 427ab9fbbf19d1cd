"""Whether what was given accelerators runs on them, by the devices that engines and trainer report."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.observed import connected, observed

from updraft.registry.v1 import registry_pb2 as pb
from updraft_operator.planning.assessment import Assessment
from updraft_operator.planning.conditions import conditions
from updraft_operator.planning.observed import ConnectionState, RegistryView

GPU: dict[str, Any] = {"engine": {"type": "VLLM"}, "serving": {"accelerator": {}}}
BY_RESOURCES = {"engine": {"type": "SGLang"}, "serving": {"resources": {"limits": {"amd.com/gpu": 1}}}}
TRAINER: dict[str, Any] = {"trainer": {"accelerator": {}}}


def _seen(*devices: str, trainer: str = "") -> RegistryView:
    """A registry that knows of pods with these devices."""
    learning: dict[str, Any] = {"learning": pb.Learning(device=trainer, world_size=1)} if trainer else {}
    reports = tuple(pb.PodState(pod=f"qwen-{n}", device=device) for n, device in enumerate(devices))
    return replace(connected(**learning), pods=reports)


def _verdict(spec: dict[str, Any], registry: RegistryView, **more: Any) -> Assessment | None:
    return conditions(observed(spec, registry=registry, **more)).get("AcceleratorInUse")


@pytest.mark.parametrize(
    ("spec", "registry", "expected"),
    [
        pytest.param(
            GPU, _seen("cuda:0", "cuda:0"), ("True", "InUse", "inference pods run on cuda:0"), id="all on GPUs"
        ),
        pytest.param(
            GPU,
            _seen("cuda:0", "cpu"),
            ("False", "CPUFallback", "qwen-1: the engine runs on CPUs, although the pod has accelerators"),
            id="one on CPUs",
        ),
        pytest.param(
            BY_RESOURCES,
            _seen(*["cpu"] * 5),
            (
                "False",
                "CPUFallback",
                "qwen-0, qwen-1, qwen-2 and 2 more: the engine runs on CPUs, although the pod has accelerators",
            ),
            id="all on CPUs with GPUs in their resources",
        ),
        pytest.param(
            GPU, _seen(""), ("Unknown", "NotReported", "no inference pod has reported its device yet"), id="starting"
        ),
        pytest.param(
            TRAINER,
            _seen("cpu", trainer="cpu (1 thread)"),
            (
                "False",
                "CPUFallback",
                "the trainer is running on cpu (1 thread), although spec.trainer.accelerator gives it more",
            ),
            id="a trainer on CPUs",
        ),
        pytest.param(
            TRAINER,
            _seen("cpu"),
            ("Unknown", "NotReported", "the trainer has not reported its device yet"),
            id="a trainer that starts",
        ),
        pytest.param(
            {**GPU, **TRAINER},
            _seen("cuda:0", trainer="NVIDIA H100"),
            ("True", "InUse", "inference pods run on cuda:0; the trainer is running on NVIDIA H100"),
            id="both",
        ),
        pytest.param(
            {"trainer": {"accelerator": {}, "suspend": True}, **GPU},
            _seen("cuda:0", trainer="cpu (1 thread)"),
            ("True", "InUse", "inference pods run on cuda:0"),
            id="the last report of a suspended trainer does not count",
        ),
        pytest.param(
            {"trainer": {"accelerator": {}, "suspend": True}},
            _seen("cpu", trainer="NVIDIA H100"),
            ("Unknown", "Suspended", "no trainer runs, by spec.trainer.suspend or spec.traces.enabled"),
            id="nothing but a suspended trainer",
        ),
        pytest.param(
            {**GPU, "suspend": True}, _seen(), ("Unknown", "Suspended", "spec.suspend is true"), id="suspended"
        ),
    ],
)
def test_the_device_of_each_report_is_compared_with_what_was_requested(
    spec: dict[str, Any], registry: RegistryView, expected: tuple[str, str, str]
) -> None:
    assert _verdict(spec, registry) == expected


@pytest.mark.parametrize("spec", [{}, {"engine": {"type": "VLLM"}}, {"serving": {"resources": {"limits": {"cpu": 4}}}}])
def test_without_accelerators_there_is_nothing_to_check(spec: dict[str, Any]) -> None:
    assert _verdict(spec, _seen("cpu", trainer="cpu (2 threads)")) is None


def test_a_device_is_not_known_without_the_registry_and_kept_while_it_is_connected_again() -> None:
    away = RegistryView(connection=ConnectionState.UNREACHABLE)
    first = observed(GPU, registry=away)
    unknown = conditions(first)["AcceleratorInUse"]
    assert unknown[:2] == ("Unknown", "RegistryNotReady")

    fallen = {
        "type": "AcceleratorInUse",
        "status": "False",
        "reason": "CPUFallback",
        "message": "qwen-1: on CPUs",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    content = first.speculator.model_dump(mode="json", by_alias=True) | {"status": {"conditions": [fallen]}}
    before = type(first.speculator).model_validate(content)
    again = observed(GPU, registry=RegistryView(connection=ConnectionState.CONNECTING), speculator=before)
    assert conditions(again)["AcceleratorInUse"] == ("False", "CPUFallback", "qwen-1: on CPUs")

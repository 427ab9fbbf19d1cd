"""What Prometheus sees of rollouts: everything that happened, and no version as a label."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.checkpoints import TARGET, draft, evaluation
from tests.support.registry import CALL_S, Registry, publish, running, state
from tests.support.registry import client as client_of
from tests.support.sim_pods import Behaviour, Quality, pods
from tests.support.wait import until

from updraft.registry.v1 import registry_pb2 as pb

if TYPE_CHECKING:
    from updraft.registry.v1.registry_pb2_grpc import RegistryAsyncStub

NUM_PODS = 4

POLICY = pb.RolloutPolicy(
    strategy=pb.STRATEGY_CANARY,
    steps=[pb.RolloutStep(pods_percent=50, hold_seconds=1)],
    progress_deadline_seconds=60,
    analysis=pb.Analysis(interval_seconds=1, min_samples=10, comparison=pb.COMPARISON_PODS),
)

# The second version is better than the first, the third much worse than both.
LENGTHS = {1: 2.0, 2: 3.0, 3: 1.2}

BEHAVIOUR = Behaviour(
    target=TARGET,
    report_s=0.3,
    requests_per_s=60.0,
    quality=lambda version: Quality(acceptance_length=LENGTHS.get(version, 1.0)),
)


async def test_rollouts_pods_swaps_and_bytes_are_told_and_no_version_is_a_label(tmp_path: Path) -> None:
    async with (
        running(tmp_path, settle_seconds=0.0) as registry,
        client_of(registry.address) as stub,
        pods(registry.address, NUM_PODS, BEHAVIOUR) as fleet,
    ):
        await publish(stub, draft(1))
        await stub.SetPolicy(pb.SetPolicyRequest(speculator="default", policy=POLICY), timeout=CALL_S)
        await until(lambda: all(pod.loaded.version == 1 for pod in fleet), what="all serve version 1")
        await _try(stub, 2)
        await stub.Pause(pb.PauseRequest(speculator="default"), timeout=CALL_S)
        await until(lambda: _paused(stub), what="the canary has been paused for a while")
        await stub.Resume(pb.ResumeRequest(speculator="default"), timeout=CALL_S)
        await until(lambda: _stable(stub, 2), what="version 2 is promoted")
        await _try(stub, 3)
        await until(lambda: _phase(stub, 3, pb.PHASE_ROLLED_BACK), what="version 3 is rolled back")
        await until(lambda: all(pod.loaded.version == 2 for pod in fleet), what="all serve version 2")
        await _check(registry)


async def _check(registry: Registry) -> None:
    def value(name: str, **labels: str) -> float:
        text = ",".join(f'{key}="{label}"' for key, label in sorted(labels.items()))
        return registry.metric(f"updraft_registry_{name}{{{text}}}" if text else f"updraft_registry_{name}")

    on = {"speculator": "default"}
    await until(lambda: value("pods", role="stable", **on) == NUM_PODS, what="all serve version 2, and said so")
    for outcome in ("promoted", "rolled_back"):
        assert value("rollouts_total", outcome=outcome, **on) == 1
        assert value("rollout_duration_seconds_count", outcome=outcome, **on) == 1
        assert value("rollout_duration_seconds_sum", outcome=outcome, **on) > 1
    assert value("rollout_pause_seconds_sum", outcome="promoted", **on) > 0.5
    assert value("rollout_pause_seconds_sum", outcome="rolled_back", **on) == 0
    roles = {role: value("version", role=role, **on) for role in ("stable", "candidate", "previous", "latest")}
    assert roles == {"stable": 2, "candidate": 0, "previous": 1, "latest": 3}
    phases = {phase: value("versions", phase=phase, **on) for phase in ("Stable", "Superseded", "RolledBack", "Canary")}
    assert phases == {"Stable": 1, "Superseded": 1, "RolledBack": 1, "Canary": 0}
    assert [value("verdict", verdict=verdict, **on) for verdict in ("pass", "fail", "hold")] == [0, 0, 0]
    assert value("transitions_total", phase="Canary", actor="gate", **on) == 2
    assert {role: value("pods", role=role, **on) for role in ("stable", "candidate", "other", "none")} == {
        "stable": NUM_PODS,
        "candidate": 0,
        "other": 0,
        "none": 0,
    }
    assert value("streams") == NUM_PODS
    assert value("acceptance_length_tokens", role="stable", **on) == pytest.approx(LENGTHS[2], rel=0.1)
    assert math.isnan(value("acceptance_length_tokens", role="candidate", **on))
    # Two pods tried the second version before the others took it over, and two the third, and came back.
    assert value("swaps_total", result="swapped") >= NUM_PODS + 4
    assert value("swaps_total", result="refused") == 0
    assert value("swap_pause_seconds_total") == pytest.approx(0.001 * value("swaps_total", result="swapped"))
    assert value("reports_total") == value("report_lag_seconds_count") > 0
    assert value("report_lag_seconds_sum") >= 0
    assert value("published_versions_total", result="new", **on) == 3
    sent = [value("fetched_bytes_total", encoding=encoding) for encoding in ("identity", "delta")]
    assert sent[0] >= NUM_PODS * len(draft(1).data)
    assert sum(sent) > sent[0], "neighbours travel as deltas"
    labels = re.findall(r'="([^"]*)"', "\n".join(_samples(registry)))
    assert not [label for label in labels if label.isdigit()]
    assert not [label for label in labels if "sha256" in label or "pod-" in label]


def _samples(registry: Registry) -> list[str]:
    """Without the bounds of histograms, which are numbers."""
    lines = registry.fetch("/metrics").splitlines()
    return [line for line in lines if line.startswith("updraft_registry_") and "_bucket{" not in line]


async def _try(stub: "RegistryAsyncStub", version: int) -> None:
    serving = (await state(stub)).stable
    await publish(stub, draft(version), source=pb.SOURCE_TRAINER, evaluation=evaluation(baseline=serving))
    await until(lambda: _phase(stub, version, pb.PHASE_CANARY), what=f"version {version} is in canary")


async def _phase(stub: "RegistryAsyncStub", version: int, phase: "pb.Phase.ValueType") -> bool:
    answer = await stub.Get(pb.GetRequest(speculator="default", version=version), timeout=CALL_S)
    return answer.version.phase == phase


async def _paused(stub: "RegistryAsyncStub") -> bool:
    return (await state(stub)).rollout.paused_ms > 1000


async def _stable(stub: "RegistryAsyncStub", version: int) -> bool:
    return (await state(stub)).stable == version

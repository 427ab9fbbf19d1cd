"""What a registry says, made by hand, and what a terminal of some width shows of it."""

import io
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, RenderableType
from tests.support import checkpoints

from updraft.registry.v1 import registry_pb2 as pb

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)

POLICY = pb.RolloutPolicy(
    strategy=pb.STRATEGY_CANARY,
    steps=[pb.RolloutStep(pods_percent=10, hold_seconds=120), pb.RolloutStep(pods_percent=50, hold_seconds=90)],
    analysis=pb.Analysis(
        interval_seconds=30,
        min_samples=200,
        failure_limit=2,
        max_acceptance_regression_percent=2,
        max_latency_regression_percent=5,
        max_domain_regression_percent=5,
        on_inconclusive=pb.ON_INCONCLUSIVE_ROLLBACK,
        confidence=0.95,
        switchback_seconds=20,
    ),
    auto_rollback=True,
    progress_deadline_seconds=900,
    revision_history_limit=10,
    offline_gate=pb.OfflineGate(min_samples=8, min_gain_percent=1, confidence=0.8),
)

EVIDENCE = "acceptance is significantly higher: 1.67 against 1.55 tokens per step, +7.5 % (+1.2 to +14.1 % at 95 %)"


def screen(picture: RenderableType, width: int = 80) -> str:
    """What it looks like without colours; spaces at the ends of lines are left out."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    with console.capture() as capture:
        console.print(picture)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def ago_ms(seconds: float) -> int:
    """A time of the wire, before NOW."""
    return int(1000 * (NOW.timestamp() - seconds))


def version(
    number: int, phase: "pb.Phase.ValueType" = pb.PHASE_STABLE, reason: str = "why", **fields: Any
) -> pb.Version:
    """A trainer's version; published `5 - number` hours ago, its phase half an hour younger."""
    manifest = checkpoints.draft(number).manifest(
        source=pb.SOURCE_TRAINER,
        parent_version=number - 1,
        provenance=pb.Provenance(
            samples=20 * number, step=7 * number, first_trace_id="aa", last_trace_id="bb", code_version="updraft/0.1.0"
        ),
        evaluation=checkpoints.evaluation(baseline=number - 1, gain=1.5),
    )
    published_s = 3600 * (5 - number)
    return pb.Version(
        version=number,
        manifest=manifest,
        phase=phase,
        reason=reason,
        published_unix_ms=ago_ms(published_s),
        phase_since_unix_ms=ago_ms(published_s - 1800),
        **fields,
    )


def rollout(**fields: Any) -> pb.Rollout:
    """Version 3 against version 2, in the first of two steps."""
    values: dict[str, Any] = {
        "candidate": 3,
        "baseline": 2,
        "comparison": pb.COMPARISON_PODS,
        "step": 0,
        "steps": 2,
        "pods_percent": 10,
        "started_unix_ms": ago_ms(250),
        "step_since_unix_ms": ago_ms(72),
        "paused_ms": 10_000,
        "verdict": pb.VERDICT_HOLD,
        "acceptance_length": pb.Estimate(
            candidate=1.67, stable=1.553, change_percent=7.5, low_percent=1.2, high_percent=14.1
        ),
        "inter_token_latency": pb.Estimate(
            candidate=0.0312, stable=0.0315, change_percent=-1.0, low_percent=-3.0, high_percent=1.1
        ),
        "candidate_requests": 1421,
        "slices": 12,
        "failures": 1,
        "evidence": EVIDENCE,
    }
    return pb.Rollout(**values | fields)


def state(**fields: Any) -> pb.SpeculatorState:
    """Version 2 serves 16 pods, and nothing is tried."""
    values: dict[str, Any] = {
        "speculator": "default",
        "stable": 2,
        "previous": 1,
        "latest": 2,
        "policy": POLICY,
        "pods": pb.Pods(connected=16, serving_stable=16),
        "message": "version 2 is stable",
        "traffic": [
            pb.VersionTraffic(
                version=2,
                verify_steps=33212,
                tokens=51478,
                proposed_by_position=[33000, 20000, 9000],
                accepted_by_position=[12000, 5000, 1000],
            )
        ],
    }
    return pb.SpeculatorState(**values | fields)


def canary(**fields: Any) -> pb.SpeculatorState:
    """Version 3 is tried on two of the pods."""
    values: dict[str, Any] = {
        "candidate": 3,
        "latest": 3,
        "pods": pb.Pods(connected=16, serving_stable=14, serving_candidate=2),
        "rollout": rollout(),
        "message": f"version 3 is in canary on 2 of 16 pods (step 1 of 2): {EVIDENCE}; step 2 in 48 s",
    }
    return state(**values | fields)

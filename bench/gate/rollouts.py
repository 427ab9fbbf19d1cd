"""Whole rollouts on a simulated fleet and clock, from publication to outcome, decided by the registry's own code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from bench.gate.traffic import SimulatedFleet, Truth

from updraft.registry.v1.registry_pb2 import Evaluation, EvaluationSample
from updraft_registry.rollout.decision import decide
from updraft_registry.rollout.placement import Directive, Pod
from updraft_registry.rollout.traffic import Traffic
from updraft_registry.rollout.version import DesiredState, Speculator, Version
from updraft_rollouts.policy import RolloutPolicy
from updraft_rollouts.terms import Phase, Source

STABLE, CANDIDATE = 1, 2
START_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a rollout."""

    end: Literal["promoted", "rolled back", "no verdict"]
    minutes: float
    """Simulated time since the candidate's publication."""
    pods_touched: int
    """Pods that were directed to serve the candidate before it was stable."""
    reason: str


def roll_out(truth: Truth, policy: RolloutPolicy, seed: Sequence[int]) -> Outcome:
    """Publish a candidate to a fleet that serves version 1, and let the registry decide on it."""
    fleet = SimulatedFleet(truth, np.random.default_rng(seed))
    speculator = Speculator(
        name="simulated",
        desired=DesiredState(policy=policy),
        versions=(_version(STABLE, Phase.STABLE), _version(CANDIDATE, Phase.PENDING)),
        latest=CANDIDATE,
    )
    directives: Mapping[str, Directive] = {}
    names = [f"pod-{number}" for number in range(truth.pods)]
    touched: set[str] = set()
    while True:
        now_ms = START_MS + round(1000 * fleet.now_s)
        serving = np.array([_serves(directives.get(name), now_ms) for name in names])
        decision = decide(speculator, _pods(names, serving, fleet, directives), now_ms)
        speculator = replace(speculator, versions=decision.versions, rollout=decision.rollout)
        candidate = speculator.versions[-1]
        if candidate.phase is not Phase.CANARY:
            return _outcome(candidate, minutes=fleet.now_s / 60, pods_touched=len(touched))
        touched |= set(decision.rollout.pods if decision.rollout else ())
        fleet.serve(serving == CANDIDATE)
        directives = decision.directives


def _outcome(candidate: Version, *, minutes: float, pods_touched: int) -> Outcome:
    end: Literal["promoted", "rolled back", "no verdict"] = "rolled back"
    if candidate.phase is Phase.STABLE:
        end = "promoted"
    elif candidate.reason.startswith("no verdict"):
        end = "no verdict"
    return Outcome(end=end, minutes=minutes, pods_touched=pods_touched, reason=candidate.reason)


def _serves(directive: Directive | None, now_ms: int) -> int:
    """The version that a pod serves until the next report. It has loaded the version of its last directive."""
    if directive is None:
        return STABLE
    if directive.switchback is None:
        return directive.serve
    turn = (now_ms - directive.switchback.start_ms) // (1000 * directive.switchback.slice_s)
    return directive.switchback.versions[turn % 2]


def _pods(
    names: Sequence[str], serving: np.ndarray, fleet: SimulatedFleet, directives: Mapping[str, Directive]
) -> list[Pod]:
    stable, candidate = fleet.totals.transpose(0, 2, 1).tolist()
    domains = fleet.by_domain.transpose(3, 1, 0, 2).tolist()
    return [
        Pod(
            name=name,
            boot="1",
            loaded=version,
            tensors_digest=_digest(version),
            prefetched=frozenset(directives[name].prefetch) if directives else frozenset({STABLE}),
            traffic={STABLE: _traffic(stable[number]), CANDIDATE: _traffic(candidate[number])},
            domains={
                version: {f"domain-{n}": _traffic(totals) for n, totals in enumerate(of_version)}
                for version, of_version in zip((STABLE, CANDIDATE), domains[number], strict=True)
            },
        )
        for number, (name, version) in enumerate(zip(names, serving.tolist(), strict=True))
    ]


def _traffic(totals: Sequence[float]) -> Traffic:
    requests, steps, tokens, latency_s = totals
    return Traffic(
        requests=round(requests),
        verify_steps=round(steps),
        tokens=round(tokens),
        latency_s=latency_s,
        latency_tokens=round(tokens),
    )


def _version(number: int, phase: Phase) -> Version:
    """A version whose evaluation passes the offline gate. Its real quality shows only in the traffic."""
    samples = (
        EvaluationSample(trace_id=f"trace-{i}", tokens=120, candidate_steps=40, baseline_steps=60) for i in range(8)
    )
    return Version(
        number=number,
        digest=_digest(number),
        tensors_digest=_digest(number),
        source=Source.TRAINER,
        phase=phase,
        reason="simulated",
        published_ms=START_MS,
        since_ms=START_MS,
        evaluation=Evaluation(baseline_version=STABLE, samples=samples),
        proven_ms=START_MS if phase is Phase.STABLE else 0,
    )


def _digest(number: int) -> str:
    return f"sha256:{number:064x}"

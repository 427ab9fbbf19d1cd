"""One observation of a canary: its evidence, its running time, and the next action.

Pure. `decide_next` tries its rules in order of importance, and the first that applies decides. If that is to wait, its
reason is the sentence that a person reads. Time counts only while pods are connected and nothing is paused. No version is
condemned for a lack of traffic if there is none to compare it with: it waits.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import NamedTuple

from updraft_registry.rollout import placement, speedup
from updraft_registry.rollout.comparison import Evidence, PodTraffic, Trial, add_reports
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.live import LiveJudgement, judge, judge_without_baseline
from updraft_registry.rollout.placement import FleetView, Pod
from updraft_registry.rollout.version import DesiredState, Rollout, Version, name_of, number_of, with_reason
from updraft_rollouts.policy import Analysis, RolloutPolicy
from updraft_rollouts.terms import Comparison, OnInconclusive, Source

MAX_SWITCHBACK_PODS = 2
"""In smaller fleets each pod is its own control, because one pod says little about another."""

_MAX_GAP_MS = 60_000
"""Longest interval between two observations that counts. There is one every second, so a longer gap means that the
registry was down or the clock was set."""


class CanaryAction(Enum):
    WAIT = auto()
    ADVANCE = auto()
    """Go to the next step."""
    PROMOTE = auto()
    ROLL_BACK = auto()


class CanaryDecision(NamedTuple):
    """The next action, and the reason that a person reads."""

    action: CanaryAction
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryState:
    rollout: Rollout
    policy: RolloutPolicy
    judgement: LiveJudgement
    pods: Collection[str]
    """Known pods that should serve the candidate."""
    num_serving: int
    """How many of these serve it."""
    num_missing: int
    """How many do not yet, without those that refused it, are draining, or report trouble."""
    num_away: int
    """Pods that should serve it, disconnected and may come back. They are not waited for."""
    trouble: str
    """Why a version that nothing can replace waits: all its pods report this. Empty if one does not."""
    num_pods: int
    """All known pods that are not draining."""
    is_settled: bool
    hold: str
    """Why the rollout is paused; empty if it is not."""

    @property
    def step(self) -> int:
        """Index of the current step, from 0."""
        return _step(self.rollout, self.policy)

    @property
    def is_in_place(self) -> bool:
        """All pods of this step serve the candidate."""
        return self.num_serving > 0 and self.num_missing == 0

    @property
    def has_won(self) -> bool:
        """The candidate may become stable."""
        return self.policy.analysis.dry_run or self.judgement.verdict is Verdict.PASS


def begin(candidate: Version, baseline: Version | None, analysis: Analysis, view: FleetView, now_ms: int) -> Rollout:
    comparison = Comparison.PODS if baseline is None else analysis.comparison
    if comparison is Comparison.AUTO:
        is_small = view.num_staying <= MAX_SWITCHBACK_PODS
        comparison = Comparison.SWITCHBACK if is_small else Comparison.PODS
    return Rollout(
        candidate=candidate.number,
        baseline=number_of(baseline),
        comparison=comparison,
        started_ms=now_ms,
        step_since_ms=now_ms,
        last_decision_ms=now_ms,
        evidence=Evidence.begin(now_ms),
    )


def can_continue(
    rollout: Rollout, candidate: Version, baseline: Version | None, analysis: Analysis, view: FleetView
) -> bool:
    """Whether a canary can continue. Otherwise it begins again, because its evidence is about another comparison."""
    if (rollout.candidate, rollout.baseline) != (candidate.number, number_of(baseline)):
        return False
    if baseline is None:
        return True
    if analysis.comparison is not Comparison.AUTO:
        return rollout.comparison is analysis.comparison
    # A single remaining pod cannot be compared with another one.
    return rollout.comparison is Comparison.SWITCHBACK or placement.size(rollout, view) != 1 or not view.is_settled


def run(
    rollout: Rollout, candidate: Version, baseline: Version | None, desired: DesiredState, view: FleetView, now_ms: int
) -> tuple[CanaryState, CanaryDecision]:
    """Observe once and decide: WAIT, PROMOTE or ROLL_BACK. Repeating it at once changes nothing."""
    directed = _directed(rollout, view)
    state = observe(rollout, candidate, baseline, desired, view)
    state = observe(_with_reports(state, directed, view, now_ms), candidate, baseline, desired, view)
    while (decision := decide_next(state)).action is CanaryAction.ADVANCE:
        further = replace(state.rollout, step=state.rollout.step + 1, step_since_ms=now_ms, held_ms=0)
        state = observe(further, candidate, baseline, desired, view)
    return state, decision


def observe(
    rollout: Rollout, candidate: Version, baseline: Version | None, desired: DesiredState, view: FleetView
) -> CanaryState:
    """The state of a canary. It takes no new pods while it is paused or pods are still reconnecting."""
    policy = desired.policy
    if view.is_settled:
        percent = policy.steps[_step(rollout, policy)].pods_percent
        keeps_one = rollout.comparison is Comparison.PODS and baseline is not None
        count = placement.share(percent, placement.size(rollout, view), keeps_one=keeps_one)
        rollout = replace(rollout, pods=placement.choose(rollout, view.pods, count, is_open=not desired.is_paused))
    trying = set(rollout.trying)
    here = [pod for pod in view.pods if pod.name in trying]
    awaited = [
        pod.is_connected and _serves(pod, rollout, candidate, baseline)
        for pod in here
        if not pod.is_draining and not pod.trouble and pod.refused != candidate.number
    ]
    return CanaryState(
        rollout=rollout,
        policy=policy,
        judgement=_judge(rollout, policy.analysis, [pod for pod in here if pod.holds(candidate)]),
        pods={pod.name for pod in here},
        num_serving=sum(awaited),
        num_missing=len(awaited) - sum(awaited),
        num_away=len(trying) - len(here),
        trouble="" if awaited else _trouble(here, candidate, baseline),
        num_pods=view.num_staying,
        is_settled=view.is_settled,
        hold=with_reason("the rollout is paused", desired.pause_reason) if desired.is_paused else "",
    )


def _trouble(pods: Sequence[Pod], candidate: Version, baseline: Version | None) -> str:
    """Why no pod can load a version that a person brought, or that is the first; empty if that is not the reason.

    A trainer publishes another version, so one of its versions is not worth a wait that may never end.
    """
    if baseline is not None and candidate.source is Source.TRAINER:
        return ""
    return next((pod.trouble for pod in pods if pod.trouble and not pod.is_draining), "")


def _judge(rollout: Rollout, analysis: Analysis, holding: Sequence[Pod]) -> LiveJudgement:
    """Judge the evidence. `holding` are the canary's pods that hold the candidate."""
    if rollout.baseline:
        return judge(rollout.evidence, analysis)
    speedups = [pod.speedup for pod in holding if pod.is_connected and pod.speedup is not None]
    return judge_without_baseline(rollout.evidence, analysis, speedup.together(speedups))


def decide_next(state: CanaryState) -> CanaryDecision:
    has_failed = state.judgement.verdict is Verdict.FAIL and not state.policy.analysis.dry_run
    if has_failed and state.policy.auto_rollback:
        return CanaryDecision(CanaryAction.ROLL_BACK, state.judgement.reason)
    standstill = _blocked_by(state, has_failed=has_failed)
    if standstill:
        return _wait(standstill)
    if _remaining_ms(state) <= 0:
        return _at_deadline(state)
    if not state.is_in_place:
        return _wait(f"waiting for {_missing(state)}, {_remaining(state)}")
    return _on_schedule(state)


def describe(state: CanaryState) -> str:
    """One sentence: the state of the canary, its evidence, and the next action."""
    rollout, policy = state.rollout, state.policy
    how = "in canary by switchback" if rollout.comparison is Comparison.SWITCHBACK else "in canary"
    where = f"on {len(state.pods)} of {state.num_pods} pods (step {state.step + 1} of {len(policy.steps)})"
    return f"{name_of(rollout.candidate)} is {how} {where}: {state.judgement.reason}; {decide_next(state).reason}"


def _blocked_by(state: CanaryState, *, has_failed: bool) -> str:
    """Why waiting does not help; empty if it does."""
    if has_failed:
        return "it failed, and auto rollback is off: promote or reject it"
    if state.hold:
        return state.hold
    if not state.num_pods:
        return "no pod is connected"
    if not state.is_settled:
        return "waiting for pods to reconnect after a registry restart"
    return f"waiting for a pod that can load it: {state.trouble}" if state.trouble else ""


def _on_schedule(state: CanaryState) -> CanaryDecision:
    """All pods serve it: hold, advance, and after the last step wait for the verdict."""
    rollout, policy, step = state.rollout, state.policy, state.step
    hold_ms, is_last = 1000 * policy.steps[step].hold_seconds, step == len(policy.steps) - 1
    if rollout.held_ms < hold_ms:
        left = _duration(hold_ms - rollout.held_ms)
        return _wait(f"the last step holds for another {left}" if is_last else f"step {step + 2} in {left}")
    if not is_last and not (state.judgement.is_tolerable or policy.analysis.dry_run):
        return _wait(f"step {step + 2} once its estimates are within the limits, {_remaining(state)}")
    if not is_last:
        return CanaryDecision(CanaryAction.ADVANCE, f"step {step + 1} is over")
    if state.has_won:
        return CanaryDecision(CanaryAction.PROMOTE, _win_reason(state))
    return _wait(f"waiting for evidence, {_remaining(state)}")


def _at_deadline(state: CanaryState) -> CanaryDecision:
    """Promote a winner. Roll back a candidate that no pod could load, whatever `on_inconclusive` is, unless it is the first."""
    within = _duration(1000 * state.policy.progress_deadline_seconds)
    on_inconclusive = state.policy.analysis.on_inconclusive
    if state.num_serving and state.has_won:
        return CanaryDecision(CanaryAction.PROMOTE, _win_reason(state))
    if not state.num_serving and not state.rollout.baseline:
        return _wait(f"waiting for {_missing(state)}")
    if not state.num_serving:
        return CanaryDecision(CanaryAction.ROLL_BACK, f"after {within} it was still waiting for {_missing(state)}")
    if on_inconclusive is OnInconclusive.PAUSE:
        return _wait(f"no verdict within {within}: promote or reject it")
    if on_inconclusive is OnInconclusive.PROMOTE:
        return CanaryDecision(
            CanaryAction.PROMOTE, f"promoted without a verdict after {within}: {state.judgement.reason}"
        )
    return CanaryDecision(CanaryAction.ROLL_BACK, f"no verdict within {within}: {state.judgement.reason}")


def _directed(rollout: Rollout, view: FleetView) -> Collection[str]:
    """Pods that were directed to serve only the candidate. A pod that waits for its turn to swap was not."""
    if rollout.comparison is Comparison.SWITCHBACK:
        return ()
    return {name for name in rollout.trying if view.directed.get(name, rollout.candidate) == rollout.candidate}


def _with_reports(state: CanaryState, directed: Collection[str], view: FleetView, now_ms: int) -> Rollout:
    """Add the time since the last observation, and the reports of the pods."""
    rollout, evidence = state.rollout, _updated_evidence(state, directed, view, now_ms)
    passed_ms = min(max(0, now_ms - rollout.last_decision_ms), _MAX_GAP_MS) if rollout.last_decision_ms else 0
    run_ms = passed_ms if state.num_pods and not state.hold and not state.trouble else 0
    is_calm = evidence.crashes == rollout.evidence.crashes  # a crash restarts the hold
    held_ms = rollout.held_ms if is_calm else 0
    return replace(
        rollout,
        last_decision_ms=now_ms,
        run_ms=rollout.run_ms + run_ms,
        held_ms=held_ms + (run_ms if state.is_in_place or held_ms else 0),
        paused_ms=rollout.paused_ms + (passed_ms if state.hold else 0),
        evidence=evidence,
    )


def _updated_evidence(state: CanaryState, directed: Collection[str], view: FleetView, now_ms: int) -> Evidence:
    rollout, analysis = state.rollout, state.policy.analysis
    pods, slice_ms = view.pods, 1000.0 * analysis.interval_seconds
    if rollout.comparison is Comparison.SWITCHBACK:
        pods = tuple(pod for pod in pods if pod.name in state.pods)
        slice_ms = _whole_cycles_ms(rollout, analysis, now_ms)
    return add_reports(
        rollout.evidence,
        [_pod_traffic(pod, rollout, analysis, now_ms) for pod in pods],
        Trial(
            candidate=rollout.candidate,
            baseline=rollout.baseline,
            directed=directed,
            canary=rollout.pods,
            trying=rollout.trying,
            is_paired=rollout.comparison is Comparison.SWITCHBACK,
            failure_limit=analysis.failure_limit,
        ),
        slice_ms=slice_ms,
        now_ms=now_ms,
    )


def _whole_cycles_ms(rollout: Rollout, analysis: Analysis, now_ms: int) -> float:
    """Minimum length of a switchback slice that ends now; infinite if none may end now.

    A slice ends only at the first observation of a cycle, so that both versions had the same number of turns. A tenth of a
    cycle may be missing, because an observation may come a little late.
    """
    cycle_ms = 2000 * analysis.switchback_seconds
    is_new_cycle = (now_ms - rollout.started_ms) // cycle_ms > (
        rollout.last_decision_ms - rollout.started_ms
    ) // cycle_ms
    num_cycles = -(-1000 * analysis.interval_seconds // cycle_ms)
    return (num_cycles - 0.1) * cycle_ms if is_new_cycle else math.inf


def _pod_traffic(pod: Pod, rollout: Rollout, analysis: Analysis, now_ms: int) -> PodTraffic:
    version = pod.loaded if rollout.comparison is Comparison.PODS else _active_version(pod, rollout, analysis, now_ms)
    return PodTraffic(
        pod=pod.name,
        boot=pod.boot,
        version=version,
        traffic=pod.traffic,
        domains=pod.domains,
        is_draining=pod.is_draining,
    )


def _active_version(pod: Pod, rollout: Rollout, analysis: Analysis, now_ms: int) -> int:
    """Version whose turn it is on a pod of a switchback, or whose turn it was when its stream broke.

    The clock decides, because a pod that crashes during a swap has not reported the swap.
    """
    if pod.loaded == rollout.candidate or rollout.candidate not in pod.prefetched:
        return pod.loaded
    if not pod.is_connected:
        before = rollout.evidence.last_reports.get(pod.name)
        return before.version if before else pod.loaded
    is_candidates = (now_ms - rollout.started_ms) // (1000 * analysis.switchback_seconds) % 2
    return rollout.candidate if is_candidates else pod.loaded


def _serves(pod: Pod, rollout: Rollout, candidate: Version, baseline: Version | None) -> bool:
    """Whether a pod serves the candidate or, in a switchback, alternates with it."""
    if pod.holds(candidate):
        return True
    is_alternating = rollout.comparison is Comparison.SWITCHBACK and candidate.number in pod.prefetched
    return is_alternating and baseline is not None and pod.holds(baseline)


def _step(rollout: Rollout, policy: RolloutPolicy) -> int:
    """Index of the current step: the last one if a new policy has fewer."""
    return min(rollout.step, len(policy.steps) - 1)


def _win_reason(state: CanaryState) -> str:
    return f"dry run: {state.judgement.reason}" if state.policy.analysis.dry_run else state.judgement.reason


def _wait(why: str) -> CanaryDecision:
    return CanaryDecision(CanaryAction.WAIT, why)


def _missing(state: CanaryState) -> str:
    if state.num_missing:
        return f"{state.num_missing} of {len(state.pods)} pods to load it"
    if state.num_away:
        return f"{state.num_away} of {len(state.rollout.trying)} pods to come back"
    return "a pod that can load it" if state.pods else "a second pod to compare with"


def _remaining_ms(state: CanaryState) -> int:
    """Time until the deadline. Without a baseline, only slices with traffic bring a rollback nearer: see ADR 0042."""
    policy, deadline_s = state.policy, state.policy.progress_deadline_seconds
    by_time_ms = 1000 * deadline_s - state.rollout.run_ms
    if not _needs_traffic(state):
        return by_time_ms
    traffic_s = state.rollout.evidence.slices * policy.analysis.interval_seconds
    return max(by_time_ms, 1000 * (deadline_s - traffic_s))


def _needs_traffic(state: CanaryState) -> bool:
    return not state.rollout.baseline and state.policy.analysis.on_inconclusive is OnInconclusive.ROLLBACK


def _remaining(state: CanaryState) -> str:
    of_traffic = " of traffic" if _needs_traffic(state) else ""
    return f"{_duration(_remaining_ms(state))}{of_traffic} until the deadline"


def _duration(milliseconds: int) -> str:
    seconds = -(-milliseconds // 1000)
    return f"{seconds} s" if seconds < 100 else f"{-(-seconds // 60)} min"

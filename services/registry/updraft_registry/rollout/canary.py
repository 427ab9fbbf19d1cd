"""A canary, from one look at the fleet to the next: what has been seen, how long it has run, what comes next.

Pure. What comes next is a list of questions in the order of their weight; the first that has an answer decides,
and where the answer is to wait it is the sentence that a person reads. Time counts from look to look, only
while pods are there and nothing is paused.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum, auto

from updraft_registry.rollout import placement
from updraft_registry.rollout.comparison import Evidence, Seen, Trial, observe
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.live import LiveJudgement, judge
from updraft_registry.rollout.placement import Pod, View
from updraft_registry.rollout.version import Rollout, Version, Wish, because, call
from updraft_rollouts.policy import Analysis, RolloutPolicy
from updraft_rollouts.terms import Comparison, OnInconclusive

MAX_SWITCHBACK_PODS = 2
"""Up to here a pod is its own control: half a fleet of two says nothing about the other half."""

_MAX_GAP_MS = 60_000
"""What counts at most of the time between two looks. There is one every second, so a longer gap is a registry
that was away or a clock that was set."""


class Next(Enum):
    """What a canary comes to."""

    WAIT = auto()
    ADVANCE = auto()
    """To the next step."""
    PROMOTE = auto()
    ROLL_BACK = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What comes next, and why, in words for a person."""

    next: Next
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A canary among the pods."""

    rollout: Rollout
    policy: RolloutPolicy
    judgement: LiveJudgement
    pods: Collection[str]
    """Those that are here and to serve the candidate."""
    num_serving: int
    """Those of them that serve it."""
    num_missing: int
    """Those that do not yet; one that refused it, drains, or has troubles of its own is not waited for."""
    num_away: int
    """Others that were to serve it, went away, and may come back; nor are these waited for."""
    num_pods: int
    """All that are known and do not drain."""
    is_settled: bool
    hold: str
    """Why the rollout is paused; empty if it is not."""

    @property
    def step(self) -> int:
        """The step that runs, from 0."""
        return _step(self.rollout, self.policy)

    @property
    def is_in_place(self) -> bool:
        """This step is on all its pods."""
        return self.num_serving > 0 and self.num_missing == 0

    @property
    def has_won(self) -> bool:
        """The candidate may serve everyone."""
        return self.policy.analysis.dry_run or self.judgement.verdict is Verdict.PASS


def begin(candidate: Version, baseline: Version, analysis: Analysis, view: View, now_ms: int) -> Rollout:
    """A canary with nothing seen yet."""
    comparison = analysis.comparison
    if comparison is Comparison.AUTO:
        is_small = view.num_staying <= MAX_SWITCHBACK_PODS
        comparison = Comparison.SWITCHBACK if is_small else Comparison.PODS
    return Rollout(
        candidate=candidate.number,
        baseline=baseline.number,
        comparison=comparison,
        started_ms=now_ms,
        step_since_ms=now_ms,
        seen_ms=now_ms,
        evidence=Evidence.begin(now_ms),
    )


def is_of(rollout: Rollout, candidate: Version, baseline: Version, analysis: Analysis, view: View) -> bool:
    """Whether a canary can go on; else it has to begin again, for the evidence is about something else."""
    if (rollout.candidate, rollout.baseline) != (candidate.number, baseline.number):
        return False
    if analysis.comparison is not Comparison.AUTO:
        return rollout.comparison is analysis.comparison
    # A single pod that is left cannot be compared with another one.
    return rollout.comparison is Comparison.SWITCHBACK or placement.size(rollout, view) != 1 or not view.is_settled


def run(
    rollout: Rollout, candidate: Version, baseline: Version, wish: Wish, view: View, now_ms: int
) -> tuple[Scene, Move]:
    """Look once: where the canary is now and what it comes to, WAIT, PROMOTE or ROLL_BACK.

    Again at once, it is where it was.
    """
    told = _told(rollout, view)
    scene = look(rollout, candidate, baseline, wish, view)
    scene = look(_watched(scene, told, view, now_ms), candidate, baseline, wish, view)
    while (move := next_move(scene)).next is Next.ADVANCE:
        further = replace(scene.rollout, step=scene.rollout.step + 1, step_since_ms=now_ms, held_ms=0)
        scene = look(further, candidate, baseline, wish, view)
    return scene, move


def look(rollout: Rollout, candidate: Version, baseline: Version, wish: Wish, view: View) -> Scene:
    """See where a canary stands. It takes no new pods while it is paused or may not see all that are there."""
    policy = wish.policy
    if view.is_settled:
        percent = policy.steps[_step(rollout, policy)].pods_percent
        count = placement.share(percent, placement.size(rollout, view), rollout.comparison)
        rollout = replace(rollout, pods=placement.choose(rollout, view.pods, count, is_open=not wish.is_paused))
    trying = set(rollout.trying)
    here = [pod for pod in view.pods if pod.name in trying]
    awaited = [
        pod.is_connected and _serves(pod, rollout, candidate, baseline)
        for pod in here
        if not pod.is_draining and not pod.trouble and pod.refused != candidate.number
    ]
    return Scene(
        rollout=rollout,
        policy=policy,
        judgement=judge(rollout.evidence, policy.analysis),
        pods={pod.name for pod in here},
        num_serving=sum(awaited),
        num_missing=len(awaited) - sum(awaited),
        num_away=len(trying) - len(here),
        num_pods=view.num_staying,
        is_settled=view.is_settled,
        hold=because("the rollout is paused", wish.pause_reason) if wish.is_paused else "",
    )


def next_move(scene: Scene) -> Move:
    """Decide what comes next."""
    has_failed = scene.judgement.verdict is Verdict.FAIL and not scene.policy.analysis.dry_run
    if has_failed and scene.policy.auto_rollback:
        return Move(next=Next.ROLL_BACK, why=scene.judgement.reason)
    standstill = _standstill(scene, has_failed=has_failed)
    if standstill:
        return _wait(standstill)
    if _left_ms(scene) <= 0:
        return _at_deadline(scene)
    if not scene.is_in_place:
        return _wait(f"waiting for {_missing(scene)}, {_span(_left_ms(scene))} until the deadline")
    return _on_schedule(scene)


def sentence(scene: Scene) -> str:
    """Where the canary stands and what it waits for."""
    rollout, policy = scene.rollout, scene.policy
    how = "in canary by switchback" if rollout.comparison is Comparison.SWITCHBACK else "in canary"
    where = f"on {len(scene.pods)} of {scene.num_pods} pods (step {scene.step + 1} of {len(policy.steps)})"
    return f"{call(rollout.candidate)} is {how} {where}: {scene.judgement.reason}; {next_move(scene).why}"


def _standstill(scene: Scene, *, has_failed: bool) -> str:
    """Why no time leads any further; empty if it does."""
    if has_failed:
        return "it failed, and automatic rollback is off: promote or reject it"
    if scene.hold:
        return scene.hold
    if not scene.num_pods:
        return "no pod is connected"
    return "" if scene.is_settled else "waiting for all pods to report to the registry, which has just started"


def _on_schedule(scene: Scene) -> Move:
    """All pods serve it: hold, then the next step, and after the last one a verdict."""
    rollout, policy, step = scene.rollout, scene.policy, scene.step
    hold_ms, is_last = 1000 * policy.steps[step].hold_seconds, step == len(policy.steps) - 1
    if rollout.held_ms < hold_ms:
        left = _span(hold_ms - rollout.held_ms)
        return _wait(f"the last step holds for another {left}" if is_last else f"step {step + 2} in {left}")
    if not is_last and not (scene.judgement.is_tolerable or policy.analysis.dry_run):
        return _wait(
            f"step {step + 2} once it seems no worse than is allowed, {_span(_left_ms(scene))} until the deadline"
        )
    if not is_last:
        return Move(next=Next.ADVANCE, why=f"step {step + 1} is over")
    if scene.has_won:
        return Move(next=Next.PROMOTE, why=_won(scene))
    return _wait(f"waiting for evidence, {_span(_left_ms(scene))} until the deadline")


def _at_deadline(scene: Scene) -> Move:
    """What has won is promoted; what no pod could load is not, whatever the policy says of no verdict."""
    within = _span(1000 * scene.policy.progress_deadline_seconds)
    on_inconclusive = scene.policy.analysis.on_inconclusive
    if scene.num_serving and scene.has_won:
        return Move(next=Next.PROMOTE, why=_won(scene))
    if not scene.num_serving:
        return Move(next=Next.ROLL_BACK, why=f"within {within} it was still waiting for {_missing(scene)}")
    if on_inconclusive is OnInconclusive.PAUSE:
        return _wait(f"no verdict within {within}: promote or reject it")
    if on_inconclusive is OnInconclusive.PROMOTE:
        return Move(next=Next.PROMOTE, why=f"promoted without a verdict after {within}: {scene.judgement.reason}")
    return Move(next=Next.ROLL_BACK, why=f"no verdict within {within}: {scene.judgement.reason}")


def _told(rollout: Rollout, view: View) -> Collection[str]:
    """Pods that were ordered to serve the candidate and nothing else; one that waited for its turn to swap was not."""
    if rollout.comparison is Comparison.SWITCHBACK:
        return ()
    return {name for name in rollout.trying if view.told.get(name, rollout.candidate) == rollout.candidate}


def _watched(scene: Scene, told: Collection[str], view: View, now_ms: int) -> Rollout:
    """Count the time since the last look, and take in what the pods report."""
    rollout, evidence = scene.rollout, _observed(scene, told, view, now_ms)
    passed_ms = min(max(0, now_ms - rollout.seen_ms), _MAX_GAP_MS) if rollout.seen_ms else 0
    run_ms = passed_ms if scene.num_pods and not scene.hold else 0
    held_ms = rollout.held_ms if evidence.crashes == rollout.evidence.crashes else 0  # a crash begins the hold anew
    return replace(
        rollout,
        seen_ms=now_ms,
        run_ms=rollout.run_ms + run_ms,
        held_ms=held_ms + (run_ms if scene.is_in_place or held_ms else 0),
        paused_ms=rollout.paused_ms + (passed_ms if scene.hold else 0),
        evidence=evidence,
    )


def _observed(scene: Scene, told: Collection[str], view: View, now_ms: int) -> Evidence:
    rollout, analysis = scene.rollout, scene.policy.analysis
    pods, slice_ms = view.pods, 1000.0 * analysis.interval_seconds
    if rollout.comparison is Comparison.SWITCHBACK:
        pods = tuple(pod for pod in pods if pod.name in scene.pods)
        slice_ms = _whole_cycles_ms(rollout, analysis, now_ms)
    return observe(
        rollout.evidence,
        [_seen(pod, rollout, analysis, now_ms) for pod in pods],
        Trial(candidate=rollout.candidate, baseline=rollout.baseline, told=told),
        slice_ms=slice_ms,
        now_ms=now_ms,
    )


def _whole_cycles_ms(rollout: Rollout, analysis: Analysis, now_ms: int) -> float:
    """How long a slice of a switchback lasts at least if it ends now.

    It ends at the first look of a cycle only, so that both versions had the same number of turns; a look may come
    a little late, which is why a tenth of a cycle may be missing.
    """
    cycle_ms = 2000 * analysis.switchback_seconds
    is_new_cycle = (now_ms - rollout.started_ms) // cycle_ms > (rollout.seen_ms - rollout.started_ms) // cycle_ms
    num_cycles = -(-1000 * analysis.interval_seconds // cycle_ms)
    return (num_cycles - 0.1) * cycle_ms if is_new_cycle else math.inf


def _seen(pod: Pod, rollout: Rollout, analysis: Analysis, now_ms: int) -> Seen:
    version = pod.loaded if rollout.comparison is Comparison.PODS else _turn(pod, rollout, analysis, now_ms)
    return Seen(pod=pod.name, boot=pod.boot, version=version, traffic=pod.traffic, is_draining=pod.is_draining)


def _turn(pod: Pod, rollout: Rollout, analysis: Analysis, now_ms: int) -> int:
    """Whose turn it is on a pod of a switchback or, once its stream is broken, whose it was then.

    One that dies in a swap has not said that it swaps: it is told by the clock.
    """
    if pod.loaded == rollout.candidate or rollout.candidate not in pod.prefetched:
        return pod.loaded
    if not pod.is_connected:
        before = rollout.evidence.marks.get(pod.name)
        return before.version if before else pod.loaded
    is_candidates = (now_ms - rollout.started_ms) // (1000 * analysis.switchback_seconds) % 2
    return rollout.candidate if is_candidates else pod.loaded


def _serves(pod: Pod, rollout: Rollout, candidate: Version, baseline: Version) -> bool:
    """Whether a pod does what the canary asks of it; in a switchback both versions have their turns."""
    if pod.holds(candidate):
        return True
    is_alternating = rollout.comparison is Comparison.SWITCHBACK and candidate.number in pod.prefetched
    return is_alternating and pod.holds(baseline)


def _step(rollout: Rollout, policy: RolloutPolicy) -> int:
    """The step that runs: the last one if a new policy has fewer."""
    return min(rollout.step, len(policy.steps) - 1)


def _won(scene: Scene) -> str:
    return f"dry run: {scene.judgement.reason}" if scene.policy.analysis.dry_run else scene.judgement.reason


def _wait(why: str) -> Move:
    return Move(next=Next.WAIT, why=why)


def _missing(scene: Scene) -> str:
    if scene.num_missing:
        return f"{scene.num_missing} of {len(scene.pods)} pods to load it"
    if scene.num_away:
        return f"{scene.num_away} of {len(scene.rollout.trying)} pods to come back"
    return "a pod that can load it" if scene.pods else "a second pod to compare with"


def _left_ms(scene: Scene) -> int:
    return 1000 * scene.policy.progress_deadline_seconds - scene.rollout.run_ms


def _span(milliseconds: int) -> str:
    seconds = -(-milliseconds // 1000)
    return f"{seconds} s" if seconds < 100 else f"{-(-seconds // 60)} min"

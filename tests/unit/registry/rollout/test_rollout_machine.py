"""Everything that can happen to a rollout, in any order, and what must hold after each decision all the same.

The invariants are those of docs/rollout.md, under the same numbers. The fleet is simulated: pods follow their
directives late or never, crash (also while they load), refuse, drain, fall silent behind a partition with the last
directive that reached them, and come back. The registry stops, and starts again with what it wrote.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.versions import NOW_MS, evaluation, version

from updraft_chassis.errors import Conflict
from updraft_registry.rollout.comparison import MAX_AWAY_MS
from updraft_registry.rollout.decision import Decision, decide, explain, promote, reject
from updraft_registry.rollout.placement import Directive, Pod
from updraft_registry.rollout.retention import versions_to_keep
from updraft_registry.rollout.speedup import Speedup
from updraft_registry.rollout.traffic import NOTHING, Traffic
from updraft_registry.rollout.version import (
    NO_DRAFT,
    Actor,
    DesiredState,
    Rollout,
    Speculator,
    Transition,
    Version,
    in_canary,
    newest_proven,
    stable,
)
from updraft_rollouts.policy import Analysis, RolloutPolicy, RolloutStep
from updraft_rollouts.terms import Comparison, OnInconclusive, Phase, Source, Strategy

NAMES = [f"pod-{i}" for i in range(7)]
SLICE_S = 30

WAITING = {Phase.PENDING, Phase.HELD}
LEGAL: Mapping[Phase, Collection[Phase]] = {
    Phase.PENDING: set(Phase) - {Phase.PENDING, Phase.ROLLED_BACK},
    Phase.HELD: set(Phase) - {Phase.PENDING, Phase.ROLLED_BACK},
    Phase.CANARY: {Phase.STABLE, Phase.HELD, Phase.ROLLED_BACK, Phase.REJECTED, Phase.FAILED},
    Phase.STABLE: {Phase.STABLE, Phase.SUPERSEDED, Phase.HELD, Phase.REJECTED, Phase.FAILED},
    Phase.SUPERSEDED: {Phase.STABLE, Phase.REJECTED, Phase.FAILED},
    Phase.REJECTED: (),
    Phase.ROLLED_BACK: (),
    Phase.FAILED: (),
}

policies = st.builds(
    RolloutPolicy,
    strategy=st.sampled_from([*[Strategy.CANARY] * 8, Strategy.IMMEDIATE, Strategy.MANUAL]),
    steps=st.sampled_from(
        [
            (RolloutStep(pods_percent=10, hold_seconds=60), RolloutStep(pods_percent=50, hold_seconds=60)),
            (
                RolloutStep(pods_percent=30, hold_seconds=0),
                RolloutStep(pods_percent=30, hold_seconds=0),
                RolloutStep(pods_percent=100, hold_seconds=30),
            ),
            (RolloutStep(pods_percent=50, hold_seconds=0),),
        ]
    ),
    analysis=st.builds(
        Analysis,
        interval_seconds=st.just(SLICE_S),
        min_samples=st.just(50),
        failure_limit=st.integers(0, 2),
        on_inconclusive=st.sampled_from(list(OnInconclusive)),
        dry_run=st.sampled_from([False, False, False, True]),
        comparison=st.sampled_from([Comparison.AUTO, Comparison.AUTO, *Comparison]),
        switchback_seconds=st.just(15),
    ),
    auto_rollback=st.sampled_from([True, True, True, False]),
    progress_deadline_seconds=st.sampled_from([120, 900]),
    max_pods_swapping=st.sampled_from([0, 0, 1, 2]),
    revision_history_limit=st.integers(1, 3),
)

gains = st.sampled_from([1.2, 1.2, 1.0, 0.8])
"""How much better a candidate is on the traffic."""


@dataclass(slots=True)
class Process:
    """A pod as it really is; the registry only knows its last report."""

    name: str
    boot: int = 0
    loaded: int = NO_DRAFT
    prefetched: frozenset[int] = frozenset()
    refused: int = NO_DRAFT
    trouble: str = ""
    directive: Directive | None = None
    is_cut_off: bool = False
    is_down: bool = False
    is_draining: bool = False
    traffic: dict[int, Traffic] = field(default_factory=dict)
    speedup: Speedup | None = None

    @property
    def is_heard(self) -> bool:
        return not self.is_cut_off and not self.is_down

    def follow(self, directive: Directive) -> None:
        """Do what the last directive says; in a switchback, the next turn."""
        turn = directive.switchback.versions if directive.switchback else (directive.serve,)
        self.loaded = turn[-1] if self.loaded == turn[0] else turn[0]
        self.prefetched, self.refused, self.trouble = frozenset(directive.prefetch), NO_DRAFT, ""

    def crash(self) -> None:
        """Lose what was in memory; what was said before stays said."""
        self.boot, self.loaded, self.refused, self.trouble, self.traffic = self.boot + 1, NO_DRAFT, NO_DRAFT, "", {}

    def serve(self, rates: Mapping[int, float]) -> None:
        """Requests for what it serves; `rates` are tokens per step by version."""
        served = {self.loaded}
        if self.directive is not None and self.directive.switchback is not None:
            served = set(self.directive.switchback.versions)
        for number in served - {NO_DRAFT}:
            tokens = round(1000 * rates.get(number, 2.0))
            more = Traffic(requests=20, verify_steps=1000, tokens=tokens, latency_s=20.0, latency_tokens=1000)
            self.traffic = self.traffic | {number: self.traffic.get(number, NOTHING) + more}


class Rollouts(RuleBasedStateMachine):
    """One speculator over its life."""

    def __init__(self) -> None:
        super().__init__()
        self.speculator = Speculator(name="default", desired=DesiredState())
        self.published: dict[int, Version] = {}
        self.processes: dict[str, Process] = {}
        self.view: dict[str, Pod] = {}
        self.directed: dict[str, int] = {}
        self.is_settled = True
        self.now_ms = NOW_MS
        self.condemned: set[int] = set()
        self.winners: list[int] = []
        self.began: tuple[object, ...] = ()
        self.at_risk: dict[str, str] = {}
        self.lost_ms: dict[str, int] = {}
        self.on_candidate: set[str] = set()
        self.decision = Decision(versions=(), rollout=None, transitions=(), directives={}, message="")

    # What happens to versions and wishes.

    @initialize(policy=policies, num_pods=st.integers(0, len(NAMES)))
    def begin(self, policy: RolloutPolicy, num_pods: int) -> None:
        self.speculator = replace(self.speculator, desired=DesiredState(policy=policy))
        self.processes = {name: Process(name=name) for name in NAMES[:num_pods]}
        self._add(None, Source.INITIAL)
        self._decide()
        self._everyone_obeys()
        self._add(3.0, Source.TRAINER)
        self._decide()

    @rule(gain=gains, num_slices=st.integers(0, 8))
    def try_another(self, gain: float, num_slices: int) -> None:
        """A good candidate, which nothing keeps from being tried."""
        self._wish(pinned=None, is_paused=False)
        self._add(3.0, Source.TRAINER)
        self._decide()
        self._everyone_obeys()
        self._serve(gain, num_slices)

    @rule(
        quality=st.sampled_from([3.0, 3.0, 3.0, 1.5, None]),
        source=st.sampled_from([Source.TRAINER, Source.TRAINER, Source.IMPORTED]),
        is_retained=st.sampled_from([False, False, True]),
        is_decided=st.booleans(),
    )
    def publish(self, *, quality: float | None, source: Source, is_retained: bool, is_decided: bool) -> None:
        self._add(quality, source, is_retained=is_retained)
        if is_decided:
            self._decide()

    @rule(data=st.data(), what=st.sampled_from(["pin", "unpin", "pause", "resume", "resume"]))
    def change_desired_state(self, data: st.DataObject, what: str) -> None:
        servable = [v.number for v in self.speculator.versions if not v.phase.is_condemned]
        if what == "pin":
            self._wish(pinned=data.draw(st.sampled_from([NO_DRAFT, *servable])))
        elif what == "unpin":
            self._wish(pinned=None)
        else:
            self._wish(is_paused=what == "pause")

    @rule(policy=policies)
    def set_policy(self, policy: RolloutPolicy) -> None:
        self._wish(policy=policy)

    @precondition(lambda self: self.published)
    @rule(data=st.data(), is_promoted=st.booleans(), is_live=st.booleans())
    def act(self, data: st.DataObject, *, is_promoted: bool, is_live: bool) -> None:
        live = [v for v in self.speculator.versions if v.phase in (Phase.STABLE, Phase.CANARY)]
        version = data.draw(st.sampled_from(live if is_live and live else list(self.published.values())))
        self._act(version, is_promoted=is_promoted)

    @rule(is_rejected=st.booleans())
    def pin_what_is_lost_then(self, *, is_rejected: bool) -> None:
        """The pinned version turns out to be no good."""
        serving = stable(self.speculator.versions)
        if serving is None:
            return
        self._wish(pinned=serving.number)
        if is_rejected:
            self._act(serving, is_promoted=False)
            return
        for process in self.processes.values():
            process.refused = serving.number
            self._report(process.name)
        self._decide()

    @rule()
    def sweep(self) -> None:
        """Retention: what is not kept can never be served again (8)."""
        in_use = {number for pod in self.view.values() for number in (pod.loaded, *pod.prefetched)}
        kept = versions_to_keep(self.speculator, in_use)
        serving = stable(self.speculator.versions)
        previous = newest_proven(self.speculator.versions, other_than=serving.number if serving else NO_DRAFT)
        candidate = in_canary(self.speculator.versions)
        needed = {version.number for version in (serving, previous, candidate) if version is not None}
        needed |= {v.number for v in self.speculator.versions if v.is_retained} | in_use
        needed |= {self.speculator.desired.pinned or NO_DRAFT} & set(self.published)
        assert needed - {NO_DRAFT} <= kept | (needed - {v.number for v in self.speculator.versions})
        versions = tuple(v for v in self.speculator.versions if v.number in kept)
        self.speculator = replace(self.speculator, versions=versions)
        self._decide()

    # What happens to pods.

    @rule(name=st.sampled_from(NAMES), times=st.integers(1, 2))
    def obey(self, name: str, times: int) -> None:
        for _ in range(times):
            self._obey(name)
        self._decide()

    @rule()
    def all_obey(self) -> None:
        self._everyone_obeys()

    @rule(name=st.sampled_from(NAMES), is_back=st.booleans())
    def crash(self, name: str, *, is_back: bool) -> None:
        """A pod dies, and is back at once or much later."""
        self._crash(name, is_back=is_back)
        self._decide()

    @rule(
        lives=st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), min_size=1, max_size=4),
        failure_limit=st.integers(0, 4),
    )
    def try_one_that_kills(self, lives: list[tuple[int, bool, bool]], failure_limit: int) -> None:
        """Some of those that are told the candidate die before they have said that they load it, again and again."""
        policy = self.speculator.desired.policy
        analysis = replace(policy.analysis, failure_limit=failure_limit)
        policy = replace(
            policy, strategy=Strategy.CANARY, steps=(RolloutStep(pods_percent=50, hold_seconds=60),), analysis=analysis
        )
        self._wish(pinned=None, is_paused=False, policy=policy)
        self._add(3.0, Source.TRAINER)
        self._decide()
        for num_pods, is_back, is_forgotten in lives:
            for name in sorted(self.on_candidate)[:num_pods]:
                self._crash(name, is_back=is_back)
            self._decide()
            if is_forgotten:
                self.expire()
            for name, process in self.processes.items():
                process.is_down = False
                self._report(name)
            self._decide()

    @rule(name=st.sampled_from(NAMES), what=st.sampled_from(["nack", "trouble", "drain", "go", "cut off"]))
    def misbehave(self, name: str, what: str) -> None:
        process = self.processes.get(name)
        if process is None:
            return
        if what == "nack" and process.directive is not None:
            process.refused = max(process.directive.prefetch, default=process.directive.serve)
        elif what == "trouble":
            process.trouble = "not yet: the disk is full"
        elif what == "go":
            del self.processes[name]
        process.is_draining |= what == "drain"
        process.is_cut_off |= what == "cut off"
        self._report(name)
        self._decide()

    @rule(name=st.sampled_from(NAMES))
    def come(self, name: str) -> None:
        """A new pod, or one that was cut off or down."""
        process = self.processes.setdefault(name, Process(name=name))
        process.is_cut_off = process.is_down = False
        self._report(name)
        self._decide()

    @rule()
    def expire(self) -> None:
        """Who has been silent for long is forgotten."""
        silent = [name for name in self.view if name not in self.processes or not self.processes[name].is_heard]
        for name in silent:
            self.lost_ms.pop(name, None)
            if not self.view.pop(name).is_draining:
                self.lost_ms[name] = self.now_ms
        self._decide()

    @rule(gain=gains, num_slices=st.integers(1, 8), has_obeyed=st.booleans())
    def serve(self, gain: float, num_slices: int, *, has_obeyed: bool) -> None:
        """Traffic on all pods."""
        if has_obeyed:
            self._everyone_obeys()
        self._serve(gain, num_slices)

    @rule(seconds=st.one_of(st.integers(0, 120), st.sampled_from([-3600, -5, 3600])))
    def time_passes(self, seconds: int) -> None:
        self.now_ms += 1000 * seconds
        self._decide()

    # What happens to the registry.

    @rule(names=st.permutations(NAMES))
    def restart(self, names: list[str]) -> None:
        """It has what it wrote; then some pods report, one by one."""
        rollout = self.speculator.rollout
        written = Rollout.from_json(rollout.to_json()) if rollout else None
        self.speculator = replace(self.speculator, rollout=written)
        assert written is None or rollout is None or written.trying == rollout.trying
        self.view, self.directed, self.is_settled = {}, {}, False
        self.at_risk, self.lost_ms = {}, {}
        self._decide()
        for name in names[:4]:
            self._report(name)
            self._decide()

    @rule()
    def settle(self) -> None:
        for name in self.processes:
            self._report(name)
        self.is_settled = True
        self._decide()

    # How it happens.

    def _add(self, quality: float | None, source: Source, *, is_retained: bool = False) -> None:
        serving, number = stable(self.speculator.versions), self.speculator.latest + 1
        evaluated = evaluation(quality, against=serving.number if serving else NO_DRAFT) if quality else None
        made = version(number, evaluation=evaluated, source=source, is_retained=is_retained)
        self.published[number] = made
        self.speculator = replace(self.speculator, versions=(*self.speculator.versions, made), latest=number)

    def _act(self, version: Version, *, is_promoted: bool) -> None:
        try:
            transitions = (promote if is_promoted else reject)(self.speculator, version, "", self.now_ms)
        except Conflict:
            return
        self._record(transitions)
        self._decide()

    def _serve(self, gain: float, num_slices: int) -> None:
        """Of acceptance length, the candidate has `gain` times that of the others."""
        candidate = in_canary(self.speculator.versions)
        for i in range(num_slices):
            self.now_ms += 1000 * (SLICE_S + 1)
            noise = 1.01 if i % 2 else 1 / 1.01
            for process in self.processes.values():
                process.speedup = Speedup(ratio=gain, low=gain - 0.05, high=gain + 0.05)
                if not process.is_down:
                    process.serve({candidate.number: 2.0 * gain * noise} if candidate else {})
                self._report(process.name)
            self._decide()

    def _wish(self, **fields: object) -> None:
        self.speculator = replace(self.speculator, desired=replace(self.speculator.desired, **fields))  # type: ignore[arg-type] # by name
        self._decide()

    def _crash(self, name: str, *, is_back: bool) -> None:
        process = self.processes.get(name)
        if process is None or process.is_down:
            return
        process.crash()
        process.is_down = not is_back
        if process.is_down and name in self.view and not process.is_cut_off:
            self.view[name] = replace(self.view[name], is_connected=False)
        self._report(name)

    def _report(self, name: str) -> None:
        """What the registry hears of a pod, if it hears of it."""
        process = self.processes.get(name)
        if process is None or not process.is_heard:
            return
        held = self.published.get(process.loaded)
        self.view[name] = Pod(
            name=name,
            boot=str(process.boot),
            loaded=process.loaded,
            tensors_digest=held.tensors_digest if held else "",
            prefetched=process.prefetched,
            refused=process.refused,
            trouble=process.trouble,
            is_draining=process.is_draining,
            traffic=process.traffic,
            speedup=process.speedup,
        )

    def _everyone_obeys(self) -> None:
        for name in self.processes:
            self._obey(name)
        self._decide()

    def _obey(self, name: str) -> None:
        process = self.processes.get(name)
        if process is None or process.is_down:
            return
        if process.directive is not None:
            process.follow(process.directive)
        self._report(name)

    def _record(self, transitions: Collection[Transition]) -> None:
        """As the catalogue does."""
        versions = {v.number: v for v in self.speculator.versions}
        for moved in transitions:
            if moved.number not in versions:  # its weights are gone; it is only remembered
                self.published[moved.number] = replace(
                    self.published[moved.number], phase=moved.after or Phase.REJECTED
                )
                continue
            before = versions[moved.number]
            assert moved.before is before.phase
            assert moved.after is not None
            assert moved.reason
            assert moved.after in LEGAL[before.phase], "(2) phases follow one another as they should"
            versions[moved.number] = replace(
                before,
                phase=moved.after,
                reason=moved.reason,
                since_ms=moved.at_ms,
                proven_ms=moved.proven_ms or before.proven_ms,
            )
            self.published[moved.number] = versions[moved.number]
            self.winners += [moved.number] if moved.proven_ms else []
        self.speculator = replace(self.speculator, versions=tuple(versions.values()))

    def _look(self) -> Decision:
        pods = [self.view[name] for name in sorted(self.view)]
        return decide(self.speculator, pods, self.now_ms, directed=self.directed, is_settled=self.is_settled)

    def _decide(self) -> None:
        before, decision = self.speculator, self._look()
        self._check_transitions(before, decision)
        self._record(decision.transitions)
        assert self.speculator.versions == decision.versions, "transitions tell everything"
        self.speculator = replace(self.speculator, rollout=decision.rollout)
        self._check_pause(before)
        self._check_crashes(before.rollout, decision)
        self._check_directives(decision)
        self.condemned |= {v.number for v in decision.versions if v.phase.is_condemned}
        self.directed = {name: directive.serve for name, directive in decision.directives.items()}
        self.decision = decision
        for name, directive in decision.directives.items():
            if name in self.processes and self.processes[name].is_heard:
                self.processes[name].directive = directive

    # What must hold.

    def _check_transitions(self, before: Speculator, decision: Decision) -> None:
        policy = before.desired.policy
        for moved in decision.transitions:
            if (moved.before, moved.after, moved.actor) == (Phase.CANARY, Phase.STABLE, Actor.GATE):
                why = {"acceptance is significantly higher": True, "dry run": policy.analysis.dry_run}
                why["promoted without a verdict"] = policy.analysis.on_inconclusive is OnInconclusive.PROMOTE
                why["decoding is significantly faster"] = why["draft tokens are accepted"] = (
                    stable(before.versions) is None
                )
                assert any(allowed and moved.reason.startswith(text) for text, allowed in why.items()), "(4)"
            if moved.after is Phase.STABLE and moved.before in WAITING and moved.actor is Actor.GATE:
                assert policy.strategy is Strategy.IMMEDIATE, "(4) a canary is not left out"

    def _check_pause(self, before: Speculator) -> None:
        """(6) While it is paused nothing new serves, no step ends, and no further pod is touched."""
        after = self.speculator
        if not before.desired.is_paused or before.desired.pinned is not None:
            return
        wins = {v.number: v.proven_ms for v in before.versions}
        assert wins == {v.number: v.proven_ms for v in after.versions}
        if before.rollout is not None and after.rollout is not None:
            begins_again = (before.rollout.baseline, before.rollout.comparison) != (
                after.rollout.baseline,
                after.rollout.comparison,
            )
            assert after.rollout.step == (0 if begins_again else before.rollout.step)
            assert set(after.rollout.pods) <= set(before.rollout.pods)

    def _check_crashes(self, before: Rollout | None, decision: Decision) -> None:
        """(12) Whoever was told the candidate and crashed is a failure of the candidate, whatever it had reported."""
        after, at_risk = decision.rollout, self.at_risk
        candidate = after.candidate if after and after.comparison is Comparison.PODS else NO_DRAFT
        directed = {
            name for name, directive in decision.directives.items() if candidate and directive.serve == candidate
        }
        away = {name: boot for name, boot in at_risk.items() if after and name in after.pods and name not in self.view}
        here = {name: pod.boot for name, pod in self.view.items() if name in directed and not pod.is_draining}
        self.at_risk = away | here
        if before is None or after is None or not candidate:
            return
        if (before.candidate, before.baseline, before.started_ms) != (
            after.candidate,
            after.baseline,
            after.started_ms,
        ):
            return
        killed = {name for name, boot in at_risk.items() if name in self.view and self.view[name].boot != boot}
        crashes, crashes_before = after.evidence.crashes, before.evidence.crashes
        assert all(crashes[name] == 1 + crashes_before.get(name, 0) for name in killed)
        failures, failures_before = (one.evidence.failures_by_pod for one in (after, before))
        assert all(failures[name] > failures_before.get(name, 0) for name in killed)
        assert after.evidence.failures >= before.evidence.failures
        assert len(directed & crashes.keys()) <= 1, "(7) of those that crashed one tries again"
        given_up = (set(before.pods) - set(after.pods) - self.view.keys()) & self.lost_ms.keys()
        may_return = any(self.now_ms - self.lost_ms[name] < MAX_AWAY_MS for name in given_up)
        assert not may_return or before.step < after.step or set(after.pods) <= set(before.pods), (
            "(7) no place is given"
        )

    def _check_directives(self, decision: Decision) -> None:
        assert set(decision.directives) == set(self.view)
        serving, candidate = stable(decision.versions), in_canary(decision.versions)
        known = {v.number: v for v in decision.versions}
        on_candidate = set()
        for name, directive in decision.directives.items():
            for number in {directive.serve, *directive.prefetch} - {NO_DRAFT}:
                assert number in known, "(3) published and kept"
                assert not known[number].phase.is_condemned, "(3) never what was condemned"
            assert (directive.serve in directive.prefetch) == bool(directive.serve)
            assert not directive.serve or directive.digest == known[directive.serve].digest
            if candidate and candidate.number in (
                directive.switchback.versions if directive.switchback else (directive.serve,)
            ):
                on_candidate.add(name)
                assert serving is None or serving.number in directive.prefetch, "(5) what it goes back to is at hand"
            elif directive.serve != (serving.number if serving else NO_DRAFT):
                assert self.view[name].holds(known[directive.serve]), "(5) no pod is moved to anything else"
        self._check_share(decision, on_candidate)
        self._check_restart(decision, on_candidate)
        self._check_pace(decision)

    def _check_share(self, decision: Decision, on_candidate: set[str]) -> None:
        """(7) A canary is on no more pods than its step says."""
        rollout, policy = decision.rollout, self.speculator.desired.policy
        if rollout is None:
            assert not on_candidate
            return
        extra = on_candidate - set(rollout.pods)
        if policy.max_pods_swapping:  # one that has it and is to give it up waits for its turn
            extra = {name for name in extra if self.view[name].loaded != rollout.candidate}
        assert not extra
        if self.is_settled:
            assert all(rollout.evidence.may_return(name) for name in set(rollout.pods) - set(self.view))
            assert len(rollout.pods) <= self._most(rollout)

    def _most(self, rollout: Rollout) -> int:
        """Pods that the candidate may be on."""
        steps = self.speculator.desired.policy.steps
        percent = steps[min(rollout.step, len(steps) - 1)].pods_percent
        num_pods = sum(not pod.is_draining for pod in self.view.values()) + len(set(rollout.pods) - set(self.view))
        most = min(num_pods, max(1, math.ceil(num_pods * percent / 100)))
        keeps_one = rollout.comparison is Comparison.PODS and rollout.baseline != NO_DRAFT
        return max(0, min(most, num_pods - 1)) if keeps_one else most

    def _check_restart(self, decision: Decision, on_candidate: set[str]) -> None:
        """(9) Pods that come back to a restarted registry are told what they were told before."""
        rollout = decision.rollout
        began = (rollout.started_ms, rollout.evidence.crashes) if rollout else ()
        if not self.is_settled and rollout is not None and began == self.began:
            moved = on_candidate ^ (self.on_candidate & set(self.view))
            if self.speculator.desired.policy.max_pods_swapping:  # who was on the way there or back may have to wait
                moved -= {pod.name for pod in self.view.values() if _waits(pod, decision)}
            assert not moved
        if self.is_settled:
            away = set(rollout.trying) - self.view.keys() if rollout else set()  # told before they went away
            self.on_candidate, self.began = on_candidate | away, began

    def _check_pace(self, decision: Decision) -> None:
        """(7) No more pods than the policy says are on their way from one version that serves to another."""
        limit = self.speculator.desired.policy.max_pods_swapping
        known = {v.number: v for v in decision.versions if not v.phase.is_condemned}
        moving = 0
        for name, directive in decision.directives.items():
            pod = self.view[name]
            held = known.get(pod.loaded)
            there = directive.switchback.versions if directive.switchback else (directive.serve,)
            is_refusing = directive.serve and pod.refused == directive.serve
            moving += held is not None and pod.holds(held) and pod.loaded not in there and not is_refusing
        assert not limit or moving <= limit

    @invariant()
    def no_two_versions_are_stable_or_in_canary(self) -> None:
        """(1) At most one of each, and never both the same rollout's leftovers."""
        phases = [v.phase for v in self.speculator.versions]
        assert phases.count(Phase.STABLE) <= 1
        assert phases.count(Phase.CANARY) <= 1
        running = self.decision.rollout
        if running is not None:
            assert [v.number for v in self.decision.versions if v.phase is Phase.CANARY] == [running.candidate]
            serving = [v.number for v in self.decision.versions if v.phase is Phase.STABLE]
            assert (serving or [NO_DRAFT]) == [running.baseline]

    @invariant()
    def what_was_condemned_stays_so(self) -> None:
        """(3)"""
        assert self.condemned <= {n for n, v in self.published.items() if v.phase.is_condemned}

    @invariant()
    def deciding_again_changes_nothing(self) -> None:
        """(10)"""
        self._decide()
        first, again = self.decision, self._look()
        assert again.transitions == ()
        assert again.rollout == first.rollout
        assert (again.versions, again.directives, again.message) == (first.versions, first.directives, first.message)
        pods = [self.view[name] for name in sorted(self.view)]
        assert explain(self.speculator, pods, is_settled=self.is_settled)[0] == first.message

    @invariant()
    def a_pin_wins(self) -> None:
        """(6) The pinned version is stable unless it may not serve, and nothing is tried beside it."""
        pinned = self.speculator.desired.pinned
        servable = {v.number for v in self.speculator.versions if not v.phase.is_condemned}
        if pinned is not None and pinned in {NO_DRAFT, *servable}:
            serving = stable(self.speculator.versions)
            assert (serving.number if serving else NO_DRAFT) == pinned
        assert pinned is None or self.speculator.rollout is None

    @invariant()
    def without_a_pin_the_last_winner_serves(self) -> None:
        """(6) Whatever was pinned or failed in between, and whatever the clock said."""
        servable = {v.number for v in self.speculator.versions if not v.phase.is_condemned}
        winner = next((number for number in reversed(self.winners) if number in servable), None)
        if self.speculator.desired.pinned is None and winner is not None:
            serving = stable(self.speculator.versions)
            assert serving is not None
            assert serving.number == winner

    @invariant()
    def nothing_is_pending_once_decided(self) -> None:
        assert not any(v.phase is Phase.PENDING for v in self.decision.versions)

    def teardown(self) -> None:
        """(11) Once everyone does as told, all come to rest: where they are told to be, and then with what has won."""
        if not self.published:
            return
        for process in self.processes.values():
            process.is_cut_off = process.is_down = False
        self.settle()
        self.expire()
        for _ in range(2 * len(self.processes) + 4):
            self._everyone_obeys()
        for name, directive in self.decision.directives.items():
            assert self.view[name].loaded in (
                directive.switchback.versions if directive.switchback else (directive.serve,)
            )
        self._all_serve_what_is_stable_in_the_end()

    def _all_serve_what_is_stable_in_the_end(self) -> None:
        policy = replace(self.speculator.desired.policy, auto_rollback=True)
        analysis = replace(policy.analysis, on_inconclusive=OnInconclusive.ROLLBACK)
        self._wish(is_paused=False, policy=replace(policy, analysis=analysis))
        for _ in range(2 * (policy.progress_deadline_seconds // SLICE_S + len(self.processes)) + 20):
            self.now_ms += 1000 * SLICE_S
            for process in self.processes.values():  # a first version waits for traffic
                process.serve({})
            self._everyone_obeys()
        num_staying = sum(not process.is_draining for process in self.processes.values())
        assert self.speculator.rollout is None or not num_staying, "a canary on pods that all go away waits for others"
        if self.speculator.rollout is None:
            serving = stable(self.speculator.versions)
            assert {pod.loaded for pod in self.view.values()} <= {serving.number if serving else NO_DRAFT}


def _waits(pod: Pod, decision: Decision) -> bool:
    """Whether a pod is told to serve what it holds already."""
    directive = decision.directives[pod.name]
    return directive.switchback is None and pod.loaded == directive.serve


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(
    max_examples=100 if settings().derandomize else 1000, stateful_step_count=30, deadline=None
)

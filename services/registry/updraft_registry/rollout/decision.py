"""Which version each pod serves: a pure function of desired state, versions, pod reports and time.

    Pending -> Held | Canary -> Stable -> Superseded      or      Rejected | RolledBack | Failed

Decisions are level-based: they read whole states, never events. Deciding again on the result changes nothing, and a
restart or a lost report costs only time. The phases alone determine which version is stable and which is in canary; a
rollout adds the progress of the canary. A pin makes a version stable; otherwise the version that won last is. A
condemned version is never served, pinned or not. docs/rollout.md explains the rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from updraft_chassis.errors import Conflict
from updraft_registry.rollout import canary, placement
from updraft_registry.rollout.canary import CanaryAction, CanaryState
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.offline import OfflineJudgement, judge
from updraft_registry.rollout.placement import Directive, FleetView, Pod
from updraft_registry.rollout.version import (
    NO_DRAFT,
    Actor,
    DesiredState,
    Rollout,
    Speculator,
    Transition,
    Version,
    in_canary,
    name_of,
    newest_proven,
    number_of,
    stable,
    with_reason,
)
from updraft_rollouts.terms import Comparison, Phase, Source, Strategy

_NEW = "nothing is published yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The new state of the versions, the transitions to it, the running canary, and one directive per pod."""

    versions: tuple[Version, ...]
    rollout: Rollout | None
    transitions: tuple[Transition, ...]
    directives: Mapping[str, Directive]
    message: str


def decide(
    speculator: Speculator,
    pods: Sequence[Pod],
    now_ms: int,
    *,
    directed: Mapping[str, int] | None = None,
    is_settled: bool = True,
) -> Decision:
    """Decide once. `pods` are those that reported recently; see `FleetView` for `directed` and `is_settled`."""
    view = FleetView(pods=tuple(pods), directed=directed or {}, is_settled=is_settled)
    transitions = Transitions(speculator.versions, now_ms)
    _fail_refused(transitions, speculator.rollout, view)
    _set_stable(transitions, speculator.desired)
    canary_state = _run_canary(transitions, speculator, view)
    _try_newest(transitions, speculator.desired, view)
    canary_state = canary_state or _run_canary(transitions, speculator, view)
    decided = replace(speculator, versions=transitions.versions, rollout=canary_state.rollout if canary_state else None)
    return Decision(
        versions=decided.versions,
        rollout=decided.rollout,
        transitions=tuple(transitions.made),
        directives=placement.directives(decided, view, canary_state.pods if canary_state else ()),
        message=_message(decided, view, canary_state),
    )


def explain(speculator: Speculator, pods: Sequence[Pod], *, is_settled: bool = True) -> tuple[str, CanaryState | None]:
    """The last decision in one sentence, with the state of the canary, as the pods are now."""
    view = FleetView(pods=tuple(pods), directed={}, is_settled=is_settled)
    candidate, baseline, canary_state = in_canary(speculator.versions), stable(speculator.versions), None
    if speculator.rollout is not None and candidate is not None:
        canary_state = canary.observe(speculator.rollout, candidate, baseline, speculator.desired, view)
    return _message(speculator, view, canary_state), canary_state


def promote(speculator: Speculator, version: Version, reason: str, now_ms: int) -> tuple[Transition, ...]:
    """Make a version stable now, whatever the gates decide. Unlike a pin, this counts as a win.

    Conflict if the version is condemned, its weights are gone, or another version is pinned.
    """
    check_servable(speculator.name, version)
    if speculator.desired.pinned not in (None, version.number):
        raise Conflict(
            f"{name_of(speculator.desired.pinned or NO_DRAFT)} is pinned in {speculator.name}; unpin it first"
        )
    transitions = Transitions(speculator.versions, now_ms)
    if version.phase is not Phase.STABLE:
        transitions.promote(version, with_reason("promoted", reason), Actor.OPERATOR)
    elif version != newest_proven(speculator.versions):  # it serves, but only because it is pinned
        transitions.move(version, Phase.STABLE, with_reason("promoted", reason), Actor.OPERATOR, is_win=True)
    return tuple(transitions.made)


def reject(speculator: Speculator, version: Version, reason: str, now_ms: int) -> tuple[Transition, ...]:
    """Never serve a version again. If it serves now, the previous winner takes over."""
    if version.phase.is_condemned:
        return ()
    transitions = Transitions(speculator.versions, now_ms)
    transitions.move(version, Phase.REJECTED, with_reason("rejected", reason), Actor.OPERATOR)
    _set_stable(transitions, speculator.desired)
    return tuple(transitions.made)


def check_servable(speculator: str, version: Version) -> None:
    """Conflict unless a version may be served."""
    what = f"version {version.number} of {speculator} is {version.phase}"
    if version.phase.is_condemned:
        raise Conflict(f"{what} and never serves again: {version.reason}")
    if not version.is_kept:
        raise Conflict(f"{what}; its weights are no longer kept")


class Transitions:
    """Working copy of the versions within one decision. Every change is recorded as a transition."""

    def __init__(self, versions: Sequence[Version], now_ms: int) -> None:
        self._versions = {version.number: version for version in sorted(versions, key=lambda v: v.number)}
        self.now_ms = now_ms
        self.made: list[Transition] = []

    @property
    def versions(self) -> tuple[Version, ...]:
        return tuple(self._versions.values())

    def move(self, version: Version, phase: Phase, reason: str, actor: Actor, *, is_win: bool = False) -> None:
        proven_ms = 0
        if is_win:  # later than all others, whatever the clock says
            proven_ms = max(self.now_ms, 1 + max(v.proven_ms for v in self.versions))
        self._versions[version.number] = replace(
            version, phase=phase, reason=reason, since_ms=self.now_ms, proven_ms=proven_ms or version.proven_ms
        )
        self.made.append(
            Transition(
                number=version.number,
                before=version.phase,
                after=phase,
                reason=reason,
                actor=actor,
                at_ms=self.now_ms,
                proven_ms=proven_ms,
            )
        )

    def promote(self, version: Version, reason: str, actor: Actor) -> None:
        self.set_stable(version, reason, actor, is_win=True)

    def set_stable(self, version: Version | None, reason: str, actor: Actor, *, is_win: bool = False) -> None:
        """Make a version stable, or none. The previous stable version steps down first.

        A version that was stable only because of a pin waits for its canary again.
        """
        current = stable(self.versions)
        if current is not None:
            took_over = f"{name_of(number_of(version))} took over: {reason}"
            phase = Phase.SUPERSEDED if is_win or current.proven_ms else Phase.HELD
            self.move(current, phase, took_over, actor)
        if version is not None:
            self.move(version, Phase.STABLE, reason, actor, is_win=is_win)

    def hold(self, version: Version, reason: str, actor: Actor) -> None:
        if version.phase is not Phase.HELD or version.reason != reason:
            self.move(version, Phase.HELD, reason, actor)


def _fail_refused(transitions: Transitions, rollout: Rollout | None, view: FleetView) -> None:
    """Fail a stable or canary version once more pods refuse it than hold it or still have to answer.

    So one broken disk does not fail a version for the fleet, nor does the first pod that answers, unless it is the only one.
    A pod that was directed to serve another one cannot refuse it.
    """
    if not view.is_settled:  # pods that hold it may not have reported yet
        return
    for version in filter(None, (stable(transitions.versions), in_canary(transitions.versions))):
        asked = _asked(version, rollout, view)
        refusals = [
            pod
            for pod in view.pods
            if pod.refused == version.number and (pod.name in asked or pod.name not in view.directed)
        ]
        if len(refusals) > len(asked - {pod.name for pod in refusals}):
            first = refusals[0]
            others = f" and {len(refusals) - 1} more" if len(refusals) > 1 else ""
            reason = f"pod {first.name}{others} could not load it: {first.refusal or 'no reason given'}"
            transitions.move(version, Phase.FAILED, reason, Actor.FLEET)


def _asked(version: Version, rollout: Rollout | None, view: FleetView) -> set[str]:
    """Pods that hold a version or were directed to serve it, always or in turn."""
    asked = {pod.name for pod in view.pods if pod.holds(version) or view.directed.get(pod.name) == version.number}
    if rollout is not None and rollout.candidate == version.number and rollout.comparison is Comparison.SWITCHBACK:
        asked |= {pod.name for pod in view.pods if pod.name in rollout.trying}
    return asked


def _set_stable(transitions: Transitions, desired: DesiredState) -> None:
    """Make the pinned version stable, or else the one that won last."""
    wanted, current = _pinned(transitions.versions, desired), stable(transitions.versions)
    is_pinned = wanted is not None or desired.pinned == NO_DRAFT
    if not is_pinned:
        wanted = newest_proven(transitions.versions) or current
    if wanted == current:
        return
    if is_pinned:
        transitions.set_stable(wanted, _hold(desired), Actor.OPERATOR)
    elif current is not None:
        # The pin was removed, or the weights of the last winner are back.
        transitions.set_stable(wanted, "unpinned: the last winner serves", Actor.OPERATOR)
    else:
        transitions.set_stable(wanted, f"{_gone(transitions)}the last winner serves", Actor.REGISTRY)


def _gone(transitions: Transitions) -> str:
    """Why this decision removed the stable version; empty if it did not."""
    gone = next((t for t in transitions.made if t.before is Phase.STABLE), None)
    if gone is None:
        return ""
    return f"{name_of(gone.number)} {'failed' if gone.after is Phase.FAILED else 'was rejected'}: "


def _pinned(versions: Sequence[Version], desired: DesiredState) -> Version | None:
    """The pinned version if it may serve: it may have failed since."""
    return next((v for v in versions if v.number == desired.pinned and not v.phase.is_condemned), None)


def _run_canary(transitions: Transitions, speculator: Speculator, view: FleetView) -> CanaryState | None:
    """Advance the version in canary; None if there is none afterwards."""
    desired, candidate, baseline = speculator.desired, in_canary(transitions.versions), stable(transitions.versions)
    if candidate is None or _called_off(transitions, candidate, desired):
        return None
    rollout, analysis = speculator.rollout, desired.policy.analysis
    if rollout is None or not canary.can_continue(rollout, candidate, baseline, analysis, view):
        before = rollout.pods if rollout is not None and rollout.candidate == candidate.number else ()
        rollout = replace(canary.begin(candidate, baseline, analysis, view, transitions.now_ms), pods=before)
    canary_state, decision = canary.run(rollout, candidate, baseline, desired, view, transitions.now_ms)
    if decision.action is CanaryAction.PROMOTE:
        transitions.promote(candidate, decision.reason, Actor.GATE)
    elif decision.action is CanaryAction.ROLL_BACK:
        transitions.move(candidate, Phase.ROLLED_BACK, decision.reason, Actor.GATE)
    return canary_state if decision.action is CanaryAction.WAIT else None


def _called_off(transitions: Transitions, candidate: Version, desired: DesiredState) -> bool:
    """End a canary for a reason other than its evidence."""
    strategy = desired.policy.strategy
    if desired.pinned is not None:
        transitions.hold(candidate, _hold(desired), Actor.OPERATOR)
    elif strategy is Strategy.CANARY or desired.is_paused:
        return False
    elif strategy is Strategy.IMMEDIATE:
        transitions.promote(candidate, f"{candidate.reason}; the strategy changed to Immediate", Actor.OPERATOR)
    else:
        transitions.hold(
            candidate, f"{candidate.reason}; the strategy changed to Manual: promote it to serve it", Actor.OPERATOR
        )
    return True


def _try_newest(transitions: Transitions, desired: DesiredState, view: FleetView) -> None:
    """Try the newest waiting version, unless a pin, a pause or a running canary prevents it."""
    waiting = [version for version in transitions.versions if version.phase.is_waiting]
    if not waiting:
        return
    *older, newest = waiting
    for version in older:
        transitions.move(version, Phase.SUPERSEDED, f"{name_of(newest.number)} is newer", Actor.REGISTRY)
    hold, running = _hold(desired), in_canary(transitions.versions)
    if hold and newest.phase is Phase.PENDING:
        transitions.hold(newest, hold, Actor.OPERATOR)
    elif hold:
        return
    elif running is not None:
        transitions.hold(newest, f"{name_of(running.number)} is in canary", Actor.REGISTRY)
    else:
        _try(transitions, newest, desired, view)


def _try(transitions: Transitions, version: Version, desired: DesiredState, view: FleetView) -> None:
    """Apply the offline gate and the strategy. Without a stable version the comparison is with no draft."""
    judgement, strategy = _judge(transitions, version, desired), desired.policy.strategy
    if judgement.verdict is not Verdict.PASS:
        # The trainer publishes another one; an imported version waits for a person.
        if judgement.is_outdated and version.source is Source.TRAINER:
            why = f"{judgement.reason}; the trainer evaluates again"
            transitions.move(version, Phase.SUPERSEDED, why, Actor.GATE)
        elif judgement.verdict is Verdict.FAIL or version.source is Source.TRAINER:
            transitions.move(version, Phase.REJECTED, judgement.reason, Actor.GATE)
        else:
            transitions.hold(version, f"{judgement.reason}: promote it to serve it", Actor.GATE)
    elif strategy is Strategy.IMMEDIATE:
        transitions.promote(version, judgement.reason, Actor.GATE)
    elif strategy is Strategy.MANUAL:
        transitions.hold(version, f"{judgement.reason}; the strategy is Manual: promote it to serve it", Actor.GATE)
    elif view.num_staying and view.is_settled:
        transitions.move(version, Phase.CANARY, judgement.reason, Actor.GATE)
    else:
        transitions.hold(version, f"{judgement.reason}; waiting for pods", Actor.GATE)


def _judge(transitions: Transitions, version: Version, desired: DesiredState) -> OfflineJudgement:
    is_first = stable(transitions.versions) is None and newest_proven(transitions.versions) is None
    brought = version.source in (Source.INITIAL, Source.IMPORTED)
    if is_first and brought and version.evaluation is None:
        return OfflineJudgement(Verdict.PASS, "the first version needs no evaluation")
    serving = number_of(stable(transitions.versions))
    return judge(version.evaluation, serving=serving, policy=desired.policy.offline_gate)


def _hold(desired: DesiredState) -> str:
    """Why no waiting version may be tried; empty if one may."""
    if desired.pinned is not None:
        return with_reason(f"{name_of(desired.pinned)} is pinned", desired.pin_reason)
    return with_reason("the rollout is paused", desired.pause_reason) if desired.is_paused else ""


def _message(speculator: Speculator, view: FleetView, canary_state: CanaryState | None) -> str:
    """One sentence: what serves, and what the rollout is waiting for."""
    if canary_state is not None:
        return canary.describe(canary_state)
    desired, serving = speculator.desired, stable(speculator.versions)
    held_back = next((v for v in reversed(speculator.versions) if v.phase is Phase.HELD), None)
    waiting = _hold(desired) or (f"{name_of(held_back.number)} is held: {held_back.reason}" if held_back else "")
    if serving is None:
        if desired.pinned == NO_DRAFT:
            return with_reason("no draft is pinned", desired.pin_reason)
        why = waiting or "waiting for the first that passes the gate"
        return f"no version serves; {why}" if speculator.is_known else _NEW
    loaded = f"version {serving.number} is stable"
    num_missing = sum(not pod.holds(serving) for pod in view.pods)
    if num_missing:
        loaded = f"{loaded}; waiting for {num_missing} of {len(view.pods)} pods to load it"
    if desired.pinned is not None and desired.pinned != serving.number:
        return f"{loaded}; version {desired.pinned} is pinned but cannot serve"
    return f"{loaded}; {waiting}" if waiting else loaded

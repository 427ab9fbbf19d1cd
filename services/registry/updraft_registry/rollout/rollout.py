"""Who serves what: a pure function of the operator's wish, the versions, what the pods report, and the time.

    Pending -> Held | Canary -> Stable -> Superseded      or      Rejected | RolledBack | Failed

Level-triggered: it looks at whole states, never at events, so deciding again on its own outcome changes
nothing, and a restart or a lost report costs time only. Who is stable, and who is in canary, is said by the
phases alone; a rollout only adds how far the canary is. A pin makes a version stable; without one the version
that won last is. What is condemned is never served, pinned or not. docs/rollout.md has the rules in words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from updraft_chassis.errors import Conflict
from updraft_registry.rollout import canary, placement
from updraft_registry.rollout.canary import Next, Scene
from updraft_registry.rollout.gate import Verdict
from updraft_registry.rollout.gate.offline import Judgement, judge
from updraft_registry.rollout.placement import Order, Pod, View
from updraft_registry.rollout.version import (
    NO_DRAFT,
    Actor,
    Rollout,
    Speculator,
    Transition,
    Version,
    Wish,
    because,
    call,
    in_canary,
    newest_proven,
    stable,
)
from updraft_rollouts.terms import Comparison, Phase, Source, Strategy

_NEW = "nothing is published yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The versions as they are now and how they got there, the canary that runs, one order a pod, what is awaited."""

    versions: tuple[Version, ...]
    rollout: Rollout | None
    transitions: tuple[Transition, ...]
    orders: Mapping[str, Order]
    message: str


def decide(
    speculator: Speculator,
    pods: Sequence[Pod],
    now_ms: int,
    *,
    told: Mapping[str, int] | None = None,
    is_settled: bool = True,
) -> Decision:
    """Decide once. `pods` are those that reported lately; `told` and `is_settled` are explained at `View`."""
    view = View(pods=tuple(pods), told=told or {}, is_settled=is_settled)
    book = _Book(speculator.versions, now_ms)
    _fail_refused(book, speculator.rollout, view)
    _seat(book, speculator.wish)
    scene = _run_canary(book, speculator, view)
    _try_newest(book, speculator.wish, view)
    scene = scene or _run_canary(book, speculator, view)
    decided = replace(speculator, versions=book.versions, rollout=scene.rollout if scene else None)
    return Decision(
        versions=decided.versions,
        rollout=decided.rollout,
        transitions=tuple(book.transitions),
        orders=placement.orders(decided, view, scene.pods if scene else ()),
        message=_message(decided, view, scene),
    )


def explain(speculator: Speculator, pods: Sequence[Pod], *, is_settled: bool = True) -> tuple[str, Scene | None]:
    """What was decided last, seen with the pods of now: one sentence on what serves and what is awaited; the canary."""
    view = View(pods=tuple(pods), told={}, is_settled=is_settled)
    candidate, baseline, scene = in_canary(speculator.versions), stable(speculator.versions), None
    if speculator.rollout is not None and candidate is not None and baseline is not None:
        scene = canary.look(speculator.rollout, candidate, baseline, speculator.wish, view)
    return _message(speculator, view, scene), scene


def promote(speculator: Speculator, version: Version, reason: str, now_ms: int) -> tuple[Transition, ...]:
    """Make a version stable now, whatever the gates say; unlike a pin it then counts as one that has won.

    Conflict for a condemned version, one whose weights are gone, or while another one is pinned.
    """
    check_servable(speculator.name, version)
    if speculator.wish.pinned not in (None, version.number):
        raise Conflict(f"{call(speculator.wish.pinned or NO_DRAFT)} is pinned in {speculator.name}; unpin it first")
    book = _Book(speculator.versions, now_ms)
    if version.phase is not Phase.STABLE:
        book.promote(version, because("promoted", reason), Actor.OPERATOR)
    elif version != newest_proven(speculator.versions):  # it serves, but only because it is pinned
        book.move(version, Phase.STABLE, because("promoted", reason), Actor.OPERATOR, is_win=True)
    return tuple(book.transitions)


def reject(speculator: Speculator, version: Version, reason: str, now_ms: int) -> tuple[Transition, ...]:
    """Never serve a version again; if it serves now, what won before it takes over."""
    if version.phase.is_condemned:
        return ()
    book = _Book(speculator.versions, now_ms)
    book.move(version, Phase.REJECTED, because("rejected", reason), Actor.OPERATOR)
    _seat(book, speculator.wish)
    return tuple(book.transitions)


def check_servable(speculator: str, version: Version) -> None:
    """Conflict unless a version may be served, by whatever way."""
    what = f"version {version.number} of {speculator} is {version.phase}"
    if version.phase.is_condemned:
        raise Conflict(f"{what} and never served again: {version.reason}")
    if not version.is_kept:
        raise Conflict(f"{what}; its weights are no longer kept")


class _Book:
    """Working copy of the versions, local to one decision; every change is also a transition."""

    def __init__(self, versions: Sequence[Version], now_ms: int) -> None:
        self._versions = {version.number: version for version in sorted(versions, key=lambda v: v.number)}
        self.now_ms = now_ms
        self.transitions: list[Transition] = []

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
        self.transitions.append(
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
        """Let it win: make it the stable one."""
        self.seat(version, reason, actor, is_win=True)

    def seat(self, version: Version | None, reason: str, actor: Actor, *, is_win: bool = False) -> None:
        """Make it the stable one, or leave none; whoever was stable steps down first.

        One that only a pin had made stable waits again to be tried.
        """
        current = stable(self.versions)
        if current is not None:
            took_over = f"{call(version.number if version else NO_DRAFT)} took over: {reason}"
            phase = Phase.SUPERSEDED if is_win or current.proven_ms else Phase.HELD
            self.move(current, phase, took_over, actor)
        if version is not None:
            self.move(version, Phase.STABLE, reason, actor, is_win=is_win)

    def hold(self, version: Version, reason: str, actor: Actor) -> None:
        """Let it wait for something."""
        if version.phase is not Phase.HELD or version.reason != reason:
            self.move(version, Phase.HELD, reason, actor)


def _fail_refused(book: _Book, rollout: Rollout | None, view: View) -> None:
    """A version that serves or is tried fails once more pods refuse it than hold it or were told to and have not said.

    So neither one broken disk nor the pod that is first to answer fails a fleet; the only pod that was told does.
    """
    if not view.is_settled:  # those that hold it may just not have reported yet
        return
    for version in filter(None, (stable(book.versions), in_canary(book.versions))):
        refusals = [pod for pod in view.pods if pod.refused == version.number]
        if len(refusals) > len(_asked(version, rollout, view) - {pod.name for pod in refusals}):
            first = refusals[0]
            others = f" and {len(refusals) - 1} more" if len(refusals) > 1 else ""
            reason = f"pod {first.name}{others} could not load it: {first.refusal or 'no reason given'}"
            book.move(version, Phase.FAILED, reason, Actor.FLEET)


def _asked(version: Version, rollout: Rollout | None, view: View) -> set[str]:
    """Pods that hold a version or are told to serve it, all the time or in turn."""
    asked = {pod.name for pod in view.pods if pod.holds(version) or view.told.get(pod.name) == version.number}
    if rollout is not None and rollout.candidate == version.number and rollout.comparison is Comparison.SWITCHBACK:
        asked |= {pod.name for pod in view.pods if pod.name in rollout.trying}
    return asked


def _seat(book: _Book, wish: Wish) -> None:
    """Make stable what has to be: the pinned version, else the one that won last."""
    wanted, current = _pinned(book.versions, wish), stable(book.versions)
    is_pinned = wanted is not None or wish.pinned == NO_DRAFT
    if not is_pinned:
        wanted = newest_proven(book.versions) or current
    if wanted == current:
        return
    if is_pinned:
        book.seat(wanted, _hold(wish), Actor.OPERATOR)
    elif current is not None:
        # The pin is gone, or the weights of what won last are back.
        book.seat(wanted, "nothing is pinned: the version that won last serves", Actor.OPERATOR)
    else:
        book.seat(wanted, f"{_gone(book)}the version that won last serves", Actor.REGISTRY)


def _gone(book: _Book) -> str:
    """Why there is no stable version any more, if that came with this decision."""
    gone = next((t for t in book.transitions if t.before is Phase.STABLE), None)
    if gone is None:
        return ""
    return f"{call(gone.number)} {'failed' if gone.after is Phase.FAILED else 'was rejected'}: "


def _pinned(versions: Sequence[Version], wish: Wish) -> Version | None:
    """The pinned version if it may serve; one that failed since, or was never kept, may not."""
    return next((v for v in versions if v.number == wish.pinned and not v.phase.is_condemned), None)


def _run_canary(book: _Book, speculator: Speculator, view: View) -> Scene | None:
    """Bring the version in canary further; None if none is, or is any more."""
    wish, candidate, baseline = speculator.wish, in_canary(book.versions), stable(book.versions)
    if candidate is None or _called_off(book, candidate, wish) or baseline is None:
        return None
    rollout, analysis = speculator.rollout, wish.policy.analysis
    if rollout is None or not canary.is_of(rollout, candidate, baseline, analysis, view):
        before = rollout.pods if rollout is not None and rollout.candidate == candidate.number else ()
        rollout = replace(canary.begin(candidate, baseline, analysis, view, book.now_ms), pods=before)
    scene, move = canary.run(rollout, candidate, baseline, wish, view, book.now_ms)
    if move.next is Next.PROMOTE:
        book.promote(candidate, move.why, Actor.GATE)
    elif move.next is Next.ROLL_BACK:
        book.move(candidate, Phase.ROLLED_BACK, move.why, Actor.GATE)
    return scene if move.next is Next.WAIT else None


def _called_off(book: _Book, candidate: Version, wish: Wish) -> bool:
    """End a canary for another reason than its evidence, if there is one."""
    strategy = wish.policy.strategy
    if wish.pinned is not None:
        book.hold(candidate, _hold(wish), Actor.OPERATOR)
    elif stable(book.versions) is None:
        book.hold(candidate, "there is nothing any more to compare it with", Actor.REGISTRY)
    elif strategy is Strategy.CANARY or wish.is_paused:
        return False
    elif strategy is Strategy.IMMEDIATE:
        book.promote(candidate, f"{candidate.reason}; the strategy is Immediate now", Actor.OPERATOR)
    else:
        book.hold(candidate, f"{candidate.reason}; the strategy is Manual now: promote it to serve it", Actor.OPERATOR)
    return True


def _try_newest(book: _Book, wish: Wish, view: View) -> None:
    """Only the newest waiting version is tried: not under a pin or a pause, and not before a running canary ended."""
    waiting = [version for version in book.versions if version.phase.is_waiting]
    if not waiting:
        return
    *older, newest = waiting
    for version in older:
        book.move(version, Phase.SUPERSEDED, f"{call(newest.number)} is newer", Actor.REGISTRY)
    hold, running = _hold(wish), in_canary(book.versions)
    if hold and newest.phase is Phase.PENDING:
        book.hold(newest, hold, Actor.OPERATOR)
    elif hold:
        return
    elif running is not None:
        book.hold(newest, f"{call(running.number)} is in canary", Actor.REGISTRY)
    else:
        _try(book, newest, wish, view)


def _try(book: _Book, version: Version, wish: Wish, view: View) -> None:
    """Ask the offline gate, then do what the strategy says."""
    is_first = stable(book.versions) is None and newest_proven(book.versions) is None
    judgement = _judge(book, version, wish, is_first=is_first)
    strategy = Strategy.IMMEDIATE if is_first else wish.policy.strategy
    if judgement.verdict is not Verdict.PASS:
        # A trainer will bring a better one; what a person brought waits for that person.
        if judgement.is_outdated and version.source is Source.TRAINER:
            why = f"{judgement.reason}: to be evaluated again"
            book.move(version, Phase.SUPERSEDED, why, Actor.GATE)
        elif judgement.verdict is Verdict.FAIL or version.source is Source.TRAINER:
            book.move(version, Phase.REJECTED, judgement.reason, Actor.GATE)
        else:
            book.hold(version, f"{judgement.reason}: promote it to serve it", Actor.GATE)
    elif strategy is Strategy.IMMEDIATE:
        book.promote(version, judgement.reason, Actor.GATE)
    elif strategy is Strategy.MANUAL:
        book.hold(version, f"{judgement.reason}; the strategy is Manual: promote it to serve it", Actor.GATE)
    elif view.num_staying and view.is_settled:
        book.move(version, Phase.CANARY, judgement.reason, Actor.GATE)
    else:
        book.hold(version, f"{judgement.reason}; waiting for pods to try it on", Actor.GATE)


def _judge(book: _Book, version: Version, wish: Wish, *, is_first: bool) -> Judgement:
    brought = version.source in (Source.INITIAL, Source.IMPORTED)
    if is_first and brought and version.evaluation is None:
        return Judgement(verdict=Verdict.PASS, reason="the first version skips the gate")
    serving = stable(book.versions)
    return judge(version.evaluation, serving=serving.number if serving else NO_DRAFT, policy=wish.policy.offline_gate)


def _hold(wish: Wish) -> str:
    """Why no waiting version may be tried; empty when they may."""
    if wish.pinned is not None:
        return because(f"{call(wish.pinned)} is pinned", wish.pin_reason)
    return because("the rollout is paused", wish.pause_reason) if wish.is_paused else ""


def _message(speculator: Speculator, view: View, scene: Scene | None) -> str:
    """One sentence: what serves, and what the rollout is waiting for."""
    if scene is not None:
        return canary.sentence(scene)
    wish, serving = speculator.wish, stable(speculator.versions)
    if serving is None:
        held = because("no draft is pinned", wish.pin_reason) if wish.pinned == NO_DRAFT else ""
        return held or (
            "no version serves; waiting for the first that passes the gate" if speculator.is_known else _NEW
        )
    loaded = f"version {serving.number} is stable"
    num_missing = sum(not pod.holds(serving) for pod in view.pods)
    if num_missing:
        loaded = f"{loaded}; waiting for {num_missing} of {len(view.pods)} pods to load it"
    if wish.pinned is not None and wish.pinned != serving.number:
        return f"{loaded}; version {wish.pinned} is pinned but cannot serve"
    held_back = next((v for v in reversed(speculator.versions) if v.phase is Phase.HELD), None)
    waiting = _hold(wish) or (f"{call(held_back.number)} is held: {held_back.reason}" if held_back else "")
    return f"{loaded}; {waiting}" if waiting else loaded

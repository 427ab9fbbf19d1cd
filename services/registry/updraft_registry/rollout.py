"""Who serves what: a pure function of the operator's wish, the versions, what the pods report, and the time.

    Pending -> Held | Stable -> Superseded      or      Rejected | Failed

Level-triggered: it looks at whole states, never at events, so deciding again on its own outcome changes
nothing, and a restart or a lost report costs time only. What serves everyone is exactly the stable version: a
pin makes a version stable, unpinning goes back to the newest one that has served before. A condemned version
is never served, pinned or not. A canary adds its steps to `_try_newest` and gives some pods another order;
nothing else has to know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from updraft_registry.gate import Judgement, Verdict, judge
from updraft_registry.version import (
    NO_DRAFT,
    Actor,
    Phase,
    Source,
    Strategy,
    Transition,
    Version,
    Wish,
    because,
    call,
    newest_proven,
    stable,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What a decision reads of a pod's last report. `refused` is the version that it nacked, 0 = none."""

    name: str
    loaded: int = NO_DRAFT
    tensors_digest: str = ""
    refused: int = NO_DRAFT
    refusal: str = ""

    def holds(self, version: Version) -> bool:
        """Whether the engine itself says that it holds this version, by number and by content."""
        return self.loaded == version.number and self.tensors_digest == version.tensors_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a pod is told: the version to serve (0 = no draft), and those to hold ready."""

    serve: int = NO_DRAFT
    digest: str = ""
    prefetch: tuple[int, ...] = ()
    phase: Phase | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The versions as they are now, how they got there, one order a pod, and what is awaited."""

    versions: tuple[Version, ...]
    transitions: tuple[Transition, ...]
    orders: Mapping[str, Order]
    message: str


def decide(wish: Wish, versions: Sequence[Version], pods: Sequence[Pod], now_ms: int) -> Decision:
    """Decide once. `versions` are those whose weights are kept; pods are those that reported lately."""
    book = _Book(versions, now_ms)
    _fail_refused(book, pods)
    _seat(book, wish)
    _try_newest(book, wish)
    order = _order(book.versions, wish)
    return Decision(
        versions=book.versions,
        transitions=tuple(book.transitions),
        orders={pod.name: order for pod in pods},
        message=_message(book.versions, wish, pods),
    )


class _Book:
    """Working copy of the versions, local to one decision; every change is also a transition."""

    def __init__(self, versions: Sequence[Version], now_ms: int) -> None:
        self._versions = {version.number: version for version in sorted(versions, key=lambda v: v.number)}
        self._now_ms = now_ms
        self.transitions: list[Transition] = []

    @property
    def versions(self) -> tuple[Version, ...]:
        return tuple(self._versions.values())

    def move(self, version: Version, phase: Phase, reason: str, actor: Actor) -> None:
        self._versions[version.number] = replace(
            version,
            phase=phase,
            reason=reason,
            since_ms=self._now_ms,
            is_proven=version.is_proven or phase is Phase.STABLE,
        )
        self.transitions.append(
            Transition(
                number=version.number,
                before=version.phase,
                after=phase,
                reason=reason,
                actor=actor,
                at_ms=self._now_ms,
            )
        )

    def promote(self, version: Version | None, reason: str, actor: Actor) -> None:
        """Make it the stable one, or leave none; whoever was stable steps down first."""
        current = stable(self.versions)
        if current is not None:
            self.move(
                current,
                Phase.SUPERSEDED,
                f"{call(version.number if version else NO_DRAFT)} took over: {reason}",
                actor,
            )
        if version is not None:
            self.move(version, Phase.STABLE, reason, actor)


def _fail_refused(book: _Book, pods: Sequence[Pod]) -> None:
    """A version fails once at least as many pods refuse it as hold it: one broken disk fails no fleet."""
    for version in book.versions:
        refusals = [pod for pod in pods if pod.refused == version.number]
        num_holding = sum(pod.holds(version) for pod in pods)
        if refusals and len(refusals) >= num_holding and not version.phase.is_condemned:
            first = refusals[0]
            others = f" and {len(refusals) - 1} more" if len(refusals) > 1 else ""
            reason = f"pod {first.name}{others} could not load it: {first.refusal or 'no reason given'}"
            book.move(version, Phase.FAILED, reason, Actor.FLEET)


def _seat(book: _Book, wish: Wish) -> None:
    """Make stable what has to be: the pinned version, else the newest that has served before."""
    wanted = _pinned(book.versions, wish)
    is_pinned = wanted is not None or wish.pinned == NO_DRAFT
    if not is_pinned:
        wanted = newest_proven(book.versions)
    if wanted == stable(book.versions):
        return
    if is_pinned:
        book.promote(wanted, _hold(wish), Actor.OPERATOR)
        return
    failed = next((t.number for t in book.transitions if t.before is Phase.STABLE), None)
    if failed is not None:
        book.promote(wanted, f"{call(failed)} failed: back to what served before", Actor.REGISTRY)
    else:
        book.promote(wanted, "unpinned: the newest version that has won serves", Actor.OPERATOR)


def _pinned(versions: Sequence[Version], wish: Wish) -> Version | None:
    """The pinned version if it may serve; one that failed since, or was never kept, may not."""
    return next((v for v in versions if v.number == wish.pinned and not v.phase.is_condemned), None)


def _try_newest(book: _Book, wish: Wish) -> None:
    """Only the newest waiting version is tried; a pin or a pause holds them all."""
    waiting = [version for version in book.versions if version.phase.is_waiting]
    if not waiting:
        return
    hold = _hold(wish)
    if hold:
        for version in waiting:
            if version.phase is Phase.PENDING:
                book.move(version, Phase.HELD, hold, Actor.OPERATOR)
        return
    *older, newest = waiting
    for version in older:
        book.move(version, Phase.SUPERSEDED, f"{call(newest.number)} is newer", Actor.REGISTRY)
    _try(book, newest, wish)


def _try(book: _Book, version: Version, wish: Wish) -> None:
    is_first = newest_proven(book.versions) is None
    judgement = _judge(book, version, wish, is_first=is_first)
    if judgement.verdict is not Verdict.PASS:
        # A trainer will bring a better one; what a person brought waits for that person.
        is_final = judgement.verdict is Verdict.FAIL or version.source is Source.TRAINER
        if is_final:
            book.move(version, Phase.REJECTED, judgement.reason, Actor.GATE)
        else:
            _hold_back(book, version, f"{judgement.reason}: pin it to serve it", Actor.GATE)
    elif wish.policy.strategy is Strategy.MANUAL and not is_first:
        _hold_back(book, version, f"{judgement.reason}; the strategy is Manual: pin it to serve it", Actor.GATE)
    else:
        book.promote(version, judgement.reason, Actor.GATE)


def _hold_back(book: _Book, version: Version, reason: str, actor: Actor) -> None:
    if version.phase is not Phase.HELD or version.reason != reason:
        book.move(version, Phase.HELD, reason, actor)


def _judge(book: _Book, version: Version, wish: Wish, *, is_first: bool) -> Judgement:
    brought = version.source in (Source.INITIAL, Source.IMPORTED)
    if is_first and brought and version.evaluation is None:
        return Judgement(verdict=Verdict.PASS, reason="the first version skips the gate")
    serving = stable(book.versions)
    return judge(version.evaluation, serving=serving.number if serving else NO_DRAFT, policy=wish.policy.gate)


def _hold(wish: Wish) -> str:
    """Why no waiting version may be tried; empty when they may."""
    if wish.pinned is not None:
        return because(f"{call(wish.pinned)} is pinned", wish.pin_reason)
    return because("the rollout is paused", wish.pause_reason) if wish.is_paused else ""


def _order(versions: Sequence[Version], wish: Wish) -> Order:
    serving = stable(tuple(versions))
    if serving is None:
        is_pinned = wish.pinned == NO_DRAFT
        return Order(reason=because("no draft is pinned", wish.pin_reason) if is_pinned else "no version serves yet")
    return Order(
        serve=serving.number,
        digest=serving.digest,
        prefetch=(serving.number,),
        phase=serving.phase,
        reason=serving.reason,
    )


def _message(versions: Sequence[Version], wish: Wish, pods: Sequence[Pod]) -> str:
    """One sentence: what serves, and what the rollout is waiting for."""
    serving = stable(tuple(versions))
    if serving is None:
        held = because("no draft is pinned", wish.pin_reason) if wish.pinned == NO_DRAFT else ""
        return held or "no version serves; waiting for the first that passes the gate"
    num_holding = sum(pod.holds(serving) for pod in pods)
    loaded = f"version {serving.number} is stable"
    if num_holding < len(pods):
        loaded = f"{loaded}; waiting for {len(pods) - num_holding} of {len(pods)} pods to load it"
    hold = _hold(wish)
    if wish.pinned is not None and wish.pinned != serving.number:
        return f"{loaded}; version {wish.pinned} is pinned but cannot serve"
    return f"{loaded}; {hold}" if hold else loaded

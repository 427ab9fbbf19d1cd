"""Where a resource is with the runtime of this operator, and why it waits: decided from one observation.

A resource whose turn began is updating until all its pods are replaced and as many serve as before. That is found out from the
workloads and their annotations, so another operator goes on where one was killed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from updraft_chassis.errors import InvalidInput
from updraft_operator.api import names
from updraft_operator.api.status import Condition
from updraft_operator.api.upgrades import UpdateMode
from updraft_operator.manifests.servers import server
from updraft_operator.planning import trainers
from updraft_operator.planning.assessment import Assessment, false, true
from updraft_operator.planning.objects import Child
from updraft_operator.planning.observed import Observed, moment
from updraft_operator.planning.pods import WAITS_FOR_A_PLACE, PodProblem, worst
from updraft_operator.planning.runtime.certificates import has_certificate
from updraft_operator.planning.runtime.records import Held, Turn, ending, having, last_turn, workloads
from updraft_operator.planning.runtime.windows import Window, is_open, next_opening
from updraft_operator.planning.serving.availability import available, desired_pods, is_rolling, num_ready
from updraft_operator.planning.traces.places import tls_servers

_AHEAD_S = 3600.0
"""How far the clock of an operator before may have been ahead."""


_SKEW_S = 60.0
"""How far the clock of the API server may be behind the operator's."""

_LATE = "the pods do not come back in time"
"""Start of the message about an update that failed by its deadline."""


class Stage(StrEnum):
    """How far a resource is, for the decision whose turn it is."""

    CURRENT = "current"
    WAITING = "waiting"
    """For something other than its turn."""
    READY = "ready"
    """For its turn."""
    UPDATING = "updating"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Failed, and somebody said that the others go on."""


APPLYING = (Stage.UPDATING, Stage.FAILED, Stage.SKIPPED)
"""Stages of a resource that has the turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgrade:
    stage: Stage
    says: Assessment
    """The condition RuntimeUpToDate."""
    current: str
    """The runtime of the pods, the oldest if they have several."""
    held: tuple[Held, ...] = ()
    ended: datetime | None = None
    """When an update ended well, if it just did."""
    due_s: float | None = None
    """Unix time at which this changes without an event."""

    @property
    def may_apply(self) -> bool:
        """Whether templates that wait may be applied, given the turn. A resource that does not come back gets them too: it has
        the turn, and perhaps they help."""
        return bool(self.held) and self.stage in (Stage.READY, *APPLYING)


def assess(observed: Observed, held: tuple[Held, ...], now: datetime) -> Upgrade:
    """The state, if the workloads in `held` wait."""
    available_now = observed.config.runtime
    current = held[0].runtime if held else available_now
    turn = _turn(observed, now)
    if turn is not None and (why := why_not_serving(observed, turn)):
        return _under_way(observed, turn, why, held, current, now)
    ended = None if turn is None else moment(max(now.timestamp(), math.ceil(turn.since_s)))
    if not held:
        says = next(_wrong_windows(observed), true("UpToDate", f"all pods have runtime {available_now}"))
        return Upgrade(stage=Stage.CURRENT, says=says, current=current, ended=ended)
    is_asked = observed.speculator.metadata.upgrade == available_now
    says = next(_waits(observed, held, now, is_asked=is_asked))
    text = f"{says.message}; then {_changes(held)} for runtime {available_now}"
    stage = Stage.READY if says.reason == "WaitingForTurn" else Stage.WAITING
    says, refused = says._replace(message=text), _before(observed, "UpdateRefused")
    if stage is Stage.READY and refused is not None:  # it is tried again, in its turn
        says = says._replace(reason=refused.reason, message=refused.message)
    return Upgrade(stage=stage, says=says, current=current, held=held, ended=ended, due_s=_due_s(observed, now))


def new_turn(observed: Observed, now: datetime) -> Turn:
    """While pods are replaced, the one that workloads have with this runtime: none is written again, and the deadline stays.
    Any other is later than the end of the last one; if it continues one, it is over when the pods are as before the first.
    """
    ended, former = _ended(observed), _turn(observed, now)
    if former is not None and (_is_under_way(observed, former) or _is_lost(observed, former)):
        return former
    since_s = max(now.timestamp(), 0.0 if ended is None else ended.timestamp() + 1.0)
    if former is not None:
        return replace(former, since_s=since_s)
    return Turn(since_s=since_s, num_ready=num_ready(observed), trains=_trainer_problem(observed) is None)


def _is_under_way(observed: Observed, turn: Turn) -> bool:
    has_it = any(child.runtime == observed.config.runtime for child in having(observed, turn))
    return has_it and bool(why_not_serving(observed, turn))


def _is_lost(observed: Observed, turn: Turn) -> bool:
    """Whether the status alone remembers a turn that failed with this runtime."""
    return _has_failed(observed) and not any(having(observed, turn))


def why_not_serving(observed: Observed, turn: Turn | None) -> str:
    """Why the pods are not as they should be, or not as they were when the turn began; empty if they are."""
    return next(_whys(observed, turn), "")


def _whys(observed: Observed, turn: Turn | None) -> Iterator[str]:
    for child in sorted(workloads(observed), key=lambda child: child.ref):
        if is_rolling(child):
            count = f"{child.status.get('updatedReplicas', 0)} of {child.status.get('replicas', 0)}"
            yield f"{count} pods of {'/'.join(child.ref)} are replaced"
        if _is_down(observed, child):
            yield f"no pod of {'/'.join(child.ref)} is ready"
    serves = next(available(observed))
    if serves.status == "False":
        yield serves.message
    if turn is not None:
        yield from _less_than_before(observed, turn)


def _less_than_before(observed: Observed, turn: Turn) -> Iterator[str]:
    for child in ending(observed):
        yield f"{'/'.join(child.ref)} is being deleted"
    if observed.child("StatefulSet", names.REGISTRY) is None:
        yield f"there is no StatefulSet/{names.child(observed.name, names.REGISTRY)}"
    num_now, num_desired = num_ready(observed), desired_pods(observed)
    if num_now < (needed := min(num_desired, turn.num_ready)):
        yield f"{num_now} inference pods are ready, and {needed} were before"
    if turn.num_ready and not num_desired and _has_failed(observed):
        yield "no inference pod is wanted now, so nothing shows that they can start"
    if turn.trains:
        yield from (f"{'/'.join(child.ref)} has no pod" for child in trainers.workloads(observed) if _has_no_pod(child))
        if (problem := _trainer_problem(observed)) is not None:
            yield problem.message


def _has_failed(observed: Observed) -> bool:
    """Whether the last plan said so, of this runtime."""
    runtime, before = observed.speculator.status.runtime, _before(observed, "UpdateFailed")
    return before is not None and runtime is not None and runtime.available == observed.config.runtime


def _was_late(observed: Observed) -> bool:
    before = _before(observed, "UpdateFailed")
    return _has_failed(observed) and before is not None and before.message.startswith(_LATE)


def _before(observed: Observed, reason: str) -> Condition | None:
    """The last condition, if it had this reason."""
    found = (each for each in observed.speculator.status.conditions if each.type == "RuntimeUpToDate")
    return next((each for each in found if each.reason == reason), None)


def _turn(observed: Observed, now: datetime) -> Turn | None:
    """The turn that is not over. A clock may be ahead a little; what is far ahead, somebody else wrote."""
    turn, ended = last_turn(observed, now.timestamp() + _AHEAD_S), _ended(observed)
    return turn if turn is not None and (ended is None or turn.since_s > ended.timestamp()) else None


def _ended(observed: Observed) -> datetime | None:
    """When the last turn ended."""
    status = observed.speculator.status.runtime
    return status.last_update_time if status is not None else None


def _under_way(
    observed: Observed, turn: Turn, why: str, held: tuple[Held, ...], current: str, now: datetime
) -> Upgrade:
    deadline_s = _deadline_s(observed, turn)
    if _was_late(observed):  # a pod that comes up after the deadline ends no failure: all of them do
        deadline_s = min(deadline_s, turn.since_s + _each_s(observed))
    is_late = now.timestamp() >= deadline_s
    problem = next(_problems(observed, turn), "")
    if not (is_late or problem or (_has_failed(observed) and not desired_pods(observed))):
        says = false("Updating", f"pods get runtime {observed.config.runtime}: {why}")
        return Upgrade(stage=Stage.UPDATING, says=says, current=current, held=held, due_s=deadline_s)
    is_skipped = observed.speculator.metadata.skipped_upgrade == observed.config.runtime
    rest = "the others go on" if is_skipped else "no other resource is updated until it does, or is skipped"
    failed = _LATE if is_late else "the pods do not come back"
    says = false("UpdateFailed", f"{failed} with runtime {observed.config.runtime}: {problem or why}; {rest}")
    stage = Stage.SKIPPED if is_skipped else Stage.FAILED
    return Upgrade(stage=stage, says=says, current=current, held=held, due_s=None if is_late else deadline_s)


def _deadline_s(observed: Observed, turn: Turn) -> float:
    """The Unix time by which the next pod has to be ready. The time starts again after each, because one is replaced after the
    other and may need most of it; but not without end, for a pod that comes and goes."""
    each_s = _each_s(observed)
    most_s = turn.since_s + each_s * max(desired_pods(observed), turn.num_ready)
    return min(_last_progress_s(observed, turn), most_s) + each_s


def _each_s(observed: Observed) -> float:
    serving = observed.speculator.spec.serving
    own_s = 0 if serving.startup_seconds is None else server.start_s(serving)
    return max(observed.config.upgrade_deadline_s, own_s)


def _last_progress_s(observed: Observed, turn: Turn) -> float:
    """When the last inference pod that was created in this turn became ready, or the turn began. The time in the Deployment's
    condition Progressing is also that of a former pod that is ready again, and it is gone when Kubernetes gives up."""
    since_s = turn.since_s
    ready = (pod for pod in observed.pods_of(names.SERVING) if not pod.is_ending)
    times = ((pod.created_s, pod.ready_s) for pod in ready)
    new = [at for made, at in times if made is not None and at is not None and made >= since_s - _SKEW_S]
    return max([since_s, *new])


def _problems(observed: Observed, turn: Turn) -> Iterator[str]:
    """Pods that do not start, more than before the turn."""
    missing = max(0, desired_pods(observed) - turn.num_ready)
    yield from _troubles(observed, names.SERVING)[missing:]
    for part in (names.REGISTRY, names.REDIS, *([names.TRAINER] if turn.trains else [])):
        yield from _troubles(observed, part)


def _troubles(observed: Observed, part: str) -> list[str]:
    """By name. A pod that finds no place waits perhaps for one that ends."""
    pods = sorted((pod for pod in observed.pods_of(part) if not pod.is_ending), key=lambda pod: pod.name)
    found = [(pod.name, pod.problem) for pod in pods if pod.problem is not None]
    real = [(name, problem) for name, problem in found if problem.reason not in WAITS_FOR_A_PLACE]
    return [f"{name}: {problem.reason}: {problem.message}" for name, problem in real]


def _waits(observed: Observed, held: tuple[Held, ...], now: datetime, *, is_asked: bool) -> Iterator[Assessment]:
    """Why nothing happens yet. Somebody who asks by name needs neither window nor pods that serve."""
    refs = [one.ref for one in held]
    if refused := next((refusal for refusal in observed.refusals if refusal.ref in refs), None):
        yield false("UpdateRefused", f"{'/'.join(refused.ref)} was refused: {refused.message}")
    if unready := [part for part in tls_servers(observed) if not has_certificate(observed, part)]:
        yield false("WaitingForServing", f"waits until {names.child(observed.name, unready[0])} has a certificate")
    if not is_asked:
        yield from _policy_waits(observed, now)
    if stopped := observed.upgrades_stopped_by:
        yield false("WaitingForTurn", f"waits, because {stopped} does not come back from its update")
    if observed.config.max_upgrades == 0:
        yield false("WaitingForTurn", "waits, because upgrades.maxConcurrent of the chart is 0")
    yield false("WaitingForTurn", "waits for its turn")


def _policy_waits(observed: Observed, now: datetime) -> Iterator[Assessment]:
    if observed.speculator.spec.update_policy.mode is UpdateMode.ON_SPEC_CHANGE:
        yield false("WaitingForSpecChange", "waits for a change of the spec, or for `kubectl updraft upgrade start`")
    yield from _wrong_windows(observed)
    opening = _opening(observed, now)
    if opening is not None:
        yield false("WaitingForWindow", f"waits for the window that opens at {opening:%Y-%m-%dT%H:%M:%SZ}")
    if why := why_not_serving(observed, None):
        yield false("WaitingForServing", f"waits until its pods serve: {why}")


def _wrong_windows(observed: Observed) -> Iterator[Assessment]:
    """Windows that cannot be read, also while nothing waits for one."""
    try:
        _windows(observed)
    except InvalidInput as error:
        yield false("InvalidWindow", str(error))


def _windows(observed: Observed) -> list[Window]:
    """Raises InvalidInput."""
    return [Window.read(text) for text in observed.speculator.spec.update_policy.windows]


def _opening(observed: Observed, now: datetime) -> datetime | None:
    """When the next window opens; None while one is open. Raises InvalidInput."""
    windows = _windows(observed)
    return None if is_open(windows, now) else next_opening(windows, now)


def _due_s(observed: Observed, now: datetime) -> float | None:
    """The Unix time at which the next window opens; None while one is open, or if none is right."""
    try:
        opening = _opening(observed, now)
    except InvalidInput:
        return None
    return None if opening is None else opening.timestamp()


def _changes(held: tuple[Held, ...]) -> str:
    listed = ", ".join(f"{'/'.join(one.ref)} ({one.change})" for one in held)
    return f"the pods of {listed} restart"


def _trainer_problem(observed: Observed) -> PodProblem | None:
    found = worst(observed.pods_of(names.TRAINER))
    return None if found is None else found[1]


def _is_down(observed: Observed, child: Child) -> bool:
    """Whether the registry or a Redis of its own lacks a pod that is ready, perhaps because none can be created."""
    is_single = child.ref.name in (names.child(observed.name, part) for part in (names.REGISTRY, names.REDIS))
    return is_single and "replicas" in child.status and child.status.get("readyReplicas", 0) < _num_wanted(child)


def _has_no_pod(child: Child) -> bool:
    return child.status.get("replicas") == 0 and _num_wanted(child) > 0


def _num_wanted(child: Child) -> int:
    return int(child.live()["spec"].get("replicas", 1))

"""A speculator in plain sentences: what it does, its problems and their fixes, its rollout, and what restarts pods."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from updraft_cli.backends.drafts import Draft, WaitingImport
from updraft_cli.backends.speculators import Condition, Resource, Speculator
from updraft_cli.cmd.explain.condition_help import READY, RESTARTS, condition_help
from updraft_cli.output import ago, count, sentence
from updraft_rollouts.terms import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    condition: str
    status: str
    reason: str
    message: str
    since: datetime | None
    meaning: str
    """Empty for a reason that this version does not know."""
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All of it; every text is a sentence."""

    namespace: str
    name: str
    does: tuple[str, ...]
    problems: tuple[Problem, ...]
    rollout: tuple[str, ...]
    restarts: dict[str, tuple[str, ...]]
    """Fields of the spec, by the part whose pods a change of them replaces."""


def explain(
    speculator: Speculator, drafts: Iterable[Draft], imports: Iterable[WaitingImport], now: datetime
) -> Explanation:
    resource = speculator.resource
    assert resource is not None, "only a cluster has conditions"
    return Explanation(
        namespace=speculator.namespace,
        name=speculator.name,
        does=tuple(_does(speculator, resource, now)),
        problems=tuple(_problem(speculator, condition) for condition in _troubled(resource.conditions)),
        rollout=(*_rollout(speculator, resource, tuple(drafts), now), *(sentence(one.text) for one in imports)),
        restarts={part: tuple(f"spec.{field}" for field in fields) for part, fields in RESTARTS.items()},
    )


def _does(speculator: Speculator, resource: Resource, now: datetime) -> Iterator[str]:
    if not resource.is_reconciled:
        yield "No operator has reconciled it yet. Is one running, and does it watch this namespace?"
        return
    if not resource.is_current:
        yield "The operator has not acted on the last change of the spec yet; the following describes the state before it."
    yield from _serving(speculator, resource)
    if resource.trainer_state and not resource.is_suspended:
        published = f"; it last published {ago(resource.last_published, now)}" if resource.last_published else ""
        why = f": {speculator.trainer_message}" if speculator.trainer_message else ""
        yield f"The trainer is {resource.trainer_state.lower()}{published}{why}."


def _serving(speculator: Speculator, resource: Resource) -> Iterator[str]:
    if resource.is_suspended:
        yield "It is suspended: no pod serves or learns; versions and status stay."
        return
    pods = speculator.pods
    wanted = count(pods.num, "pod") if pods.wanted is None else f"{pods.num} of {count(pods.wanted, 'pod')}"
    where = f" at {resource.url}" if resource.url and pods.num else ""
    yield f"It serves {resource.target}{where}; {wanted} ready."
    if not speculator.stable and speculator.candidate:
        yield f"Version {speculator.candidate} of the draft, the first, is in canary; other pods serve no draft."
    elif not speculator.stable:
        yield "No draft serves: answers are right, and no faster than without speculation."
    else:
        yield f"Version {speculator.stable} of the draft serves{_acceptance(speculator)}."
        if pods.serving_stable is not None and pods.serving_stable < pods.num:
            yield f"{pods.serving_stable} of {count(pods.num, 'ready pod')} have loaded it."
    if pods.failed:
        yield f"{count(pods.failed, 'pod')} with a problem; see the conditions."


def _acceptance(speculator: Speculator) -> str:
    acceptance = speculator.acceptance
    if acceptance is None:
        return ""
    steps = f" over more than {count(acceptance.verify_steps, 'step')}" if acceptance.verify_steps else ""
    return f": {acceptance.length:.2f} tokens per verify step{steps}"


def _troubled(conditions: tuple[Condition, ...]) -> Iterator[Condition]:
    """Yield those that are not True; Ready and FullyScaled only if no condition before has their reason."""
    reasons = {condition.reason for condition in conditions if condition.type in READY}
    for condition in conditions:
        is_copy = condition.type in ("Ready", "FullyScaled") and condition.reason in reasons
        if condition.status != "True" and not is_copy:
            yield condition


def _problem(speculator: Speculator, condition: Condition) -> Problem:
    known = condition_help(condition.type, condition.reason, name=speculator.name, namespace=speculator.namespace)
    return Problem(
        condition=condition.type,
        status=condition.status,
        reason=condition.reason,
        message=condition.message,
        since=condition.since,
        meaning=known.meaning if known else "",
        action=known.action if known else "",
    )


def _rollout(speculator: Speculator, resource: Resource, drafts: tuple[Draft, ...], now: datetime) -> Iterator[str]:
    if speculator.message:
        yield sentence(speculator.message)
    if speculator.pinned is not None:
        pinned = f"Version {speculator.pinned}" if speculator.pinned else "No draft"
        yield f"{pinned} is pinned (spec.rollout.pinnedVersion): newer versions are held until the pin ends."
    if speculator.paused:
        yield "It is paused (spec.rollout.paused): no new version is tried until it is resumed."
    waiting = [draft for draft in drafts if draft.phase in {"pending", "held"}]
    if waiting and speculator.policy.strategy is Strategy.MANUAL:
        yield f"With strategy Manual it waits for a person: {_numbers(waiting)} can be promoted."
    if (failure := resource.last_failure) is not None:
        when = f" {ago(failure.time, now)}" if failure.time else ""
        yield f"Version {failure.version} failed{when}: {sentence(failure.message or failure.reason)}"
    if not drafts and not speculator.latest:
        yield "There is no version yet."


def _numbers(drafts: list[Draft]) -> str:
    numbers = sorted(draft.version for draft in drafts)
    return f"version{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"

"""A speculator in plain sentences: what it does, what is amiss and what to do, what the rollout waits for, what restarts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from updraft_cli.backends.objects import Condition, Speculator, Version
from updraft_cli.cmd.explain.condition_help import READY, RESTARTS, advice
from updraft_cli.output import ago, count, sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A condition that is not True."""

    condition: str
    status: str
    reason: str
    message: str
    since: datetime | None
    meaning: str
    """Empty for a reason that this program does not know."""
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All that there is to say; every text is a sentence."""

    namespace: str
    name: str
    does: tuple[str, ...]
    problems: tuple[Problem, ...]
    rollout: tuple[str, ...]
    restarts: dict[str, tuple[str, ...]]
    """Fields of the spec by the part whose pods a change of them replaces."""


def explain(found: Speculator, versions: Iterable[Version], now: datetime) -> Explanation:
    """Explain a speculator that has these versions."""
    return Explanation(
        namespace=found.namespace,
        name=found.name,
        does=tuple(_does(found, now)),
        problems=tuple(_problem(found, condition) for condition in _troubled(found)),
        rollout=tuple(_rollout(found, tuple(versions), now)),
        restarts={part: tuple(f"spec.{field}" for field in fields) for part, fields in RESTARTS.items()},
    )


def _does(found: Speculator, now: datetime) -> Iterator[str]:
    if not found.is_known:
        yield "No operator has said anything of it yet. Is one running, and does it watch this namespace?"
        return
    if not found.is_current:
        yield "The operator has not acted on the last change of the spec yet; what follows is of before."
    yield from _serving(found)
    yield from _learning(found, now)


def _serving(found: Speculator) -> Iterator[str]:
    if found.is_suspended:
        yield "It is suspended: no pod serves or learns; versions and status stay."
        return
    pods = found.pods
    wanted = count(pods.ready, "pod") if pods.wanted is None else f"{pods.ready} of {count(pods.wanted, 'pod')}"
    where = f" at {found.url}" if found.url and pods.ready else ""
    yield f"It serves {found.target}{where}; {wanted} ready."
    if (stable := found.versions.stable) is None:
        yield "No draft serves: answers are right, and no faster than without."
    else:
        yield f"Version {stable} of the draft serves{_acceptance(found)}."
        if pods.serving_stable is not None and pods.serving_stable < pods.ready:
            yield f"{count(pods.serving_stable, 'pod')} of {pods.ready} say that they have loaded it."
    if pods.failed:
        yield f"{count(pods.failed, 'pod')} in trouble; see the conditions."


def _acceptance(found: Speculator) -> str:
    acceptance = found.acceptance
    if not acceptance.stable:
        return ""
    over = f" over more than {count(acceptance.verify_steps, 'step')}" if acceptance.verify_steps else ""
    return f": {acceptance.stable} tokens a verify step{over}"


def _learning(found: Speculator, now: datetime) -> Iterator[str]:
    trainer = found.trainer
    if trainer.state and not found.is_suspended:
        published = f"; it last published {ago(trainer.last_published, now)}" if trainer.last_published else ""
        yield f"The trainer is {trainer.state.lower()}{published}."


def _troubled(found: Speculator) -> Iterator[Condition]:
    """Those that are not True; Ready only if what it was copied from is not there."""
    parts = {condition.reason for condition in found.conditions if condition.type in READY}
    for condition in found.conditions:
        is_copy = condition.type == "Ready" and condition.reason in parts
        if condition.status != "True" and not is_copy:
            yield condition


def _problem(found: Speculator, condition: Condition) -> Problem:
    known = advice(condition.type, condition.reason, name=found.name, namespace=found.namespace)
    return Problem(
        condition=condition.type,
        status=condition.status,
        reason=condition.reason,
        message=condition.message,
        since=condition.since,
        meaning=known.meaning if known else "",
        action=known.action if known else "",
    )


def _rollout(found: Speculator, versions: tuple[Version, ...], now: datetime) -> Iterator[str]:
    wishes = found.wishes
    if found.rollout.message:
        yield sentence(found.rollout.message)
    if wishes.pinned is not None:
        what = f"Version {wishes.pinned}" if wishes.pinned else "No draft"
        yield f"{what} is pinned (spec.rollout.pinnedVersion): newer ones are held until it is unpinned."
    if wishes.paused:
        yield "It is paused (spec.rollout.paused): nothing new is tried until it is resumed."
    waiting = [version for version in versions if version.phase in {"pending", "held"}]
    if waiting and wishes.strategy == "Manual":
        yield f"With strategy Manual it waits for a person: {_numbers(waiting)} can be promoted."
    importing = [version.name for version in versions if version.phase == "importing" or version.number is None]
    if importing:
        yield f"Being imported: {', '.join(importing)}."
    if (failure := found.last_failure) is not None:
        when = f" {ago(failure.time, now)}" if failure.time else ""
        yield f"Version {failure.version} was found to be no good{when}: {sentence(failure.message or failure.reason)}"
    if not versions and found.versions.latest is None:
        yield "There is no version yet."


def _numbers(versions: list[Version]) -> str:
    numbers = sorted(version.number for version in versions if version.number is not None)
    return f"version{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"

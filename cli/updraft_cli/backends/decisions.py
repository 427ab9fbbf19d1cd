"""A person's decision as fields of the resource to patch: pure, from what the API server holds now."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from updraft_chassis.errors import Conflict, NotFound
from updraft_cli.backends.drafts import Draft
from updraft_cli.backends.objects import NO_DRAFT
from updraft_cli.backends.protocol import Verb, decided
from updraft_cli.backends.speculators import LOST, Speculator

_WAITING = ("pending", "held", "canary")


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchFields:
    """The field of spec.rollout to set, and the answer to the person."""

    field: str
    value: Any
    """None removes the field, and with it our ownership of it."""
    message: str
    is_change: bool = True
    """False: it is so already, and nothing is sent."""


def patch_fields(verb: Verb, speculator: Speculator, drafts: Iterable[Draft], number: int) -> PatchFields:
    """Return the patch for a decision; NotFound or Conflict for a version that cannot serve."""
    match verb:
        case Verb.PIN:
            return _pin(speculator, drafts, number)
        case Verb.UNPIN:
            return _unpin(speculator)
        case Verb.PROMOTE:
            return _promote(speculator, drafts, number)
        case Verb.PAUSE:
            return _pause(speculator)
        case Verb.RESUME:
            return _resume(speculator)


def _pin(speculator: Speculator, drafts: Iterable[Draft], number: int) -> PatchFields:
    if number:
        _check_servable(speculator, drafts, number)
    undo = f"`{_command('draft unpin', speculator)}`"
    if speculator.pinned == number:
        return _unchanged("pinnedVersion", f"{_pinned(speculator)} already; {undo} ends it.")
    if number == speculator.stable:
        follows = "it serves already."
    elif number:
        follows = "all pods load it now, without analysis and without a restart."
    else:
        follows = "all pods continue without a draft: the same answers, more slowly."
    follows = f"{follows} Newer versions are held until {undo}."
    return _change(Verb.PIN, speculator, "pinnedVersion", follows, value=number or NO_DRAFT, number=number)


def _unpin(speculator: Speculator) -> PatchFields:
    if speculator.pinned is None:
        return _unchanged("pinnedVersion", f"{speculator.name} is not pinned.")
    follows = "the last promoted version serves, and newer ones are tried again. No pod restarts."
    return _change(Verb.UNPIN, speculator, "pinnedVersion", follows, value=None)


def _pause(speculator: Speculator) -> PatchFields:
    undo = f"`{_command('rollout resume', speculator)}`"
    if speculator.paused:
        return _unchanged("paused", f"The rollout of {speculator.name} is paused already; {undo} continues it.")
    candidate = speculator.candidate
    stays = f"version {candidate} stays in canary on its pods" if candidate else "the stable version keeps serving"
    follows = f"{stays}, and no new version is tried until {undo}. A canary that fails is still rolled back."
    return _change(Verb.PAUSE, speculator, "paused", follows, value=True)


def _resume(speculator: Speculator) -> PatchFields:
    if not speculator.paused:
        return _unchanged("paused", f"The rollout of {speculator.name} is not paused.")
    candidate = speculator.candidate
    follows = f"the canary of version {candidate} continues." if candidate else "new versions are tried again."
    # Removed rather than set to false, which is the default: the field then belongs to nobody.
    return _change(Verb.RESUME, speculator, "paused", follows, value=None)


def _promote(speculator: Speculator, drafts: Iterable[Draft], number: int) -> PatchFields:
    name, draft = speculator.name, _check_servable(speculator, drafts, number)
    if draft.phase == "stable":
        return _unchanged("promotedVersion", f"Version {number} of {name} is stable already.")
    if speculator.pinned is not None:
        raise Conflict(f"{_pinned(speculator)}: run `{_command('draft unpin', speculator)}` first")
    if draft.phase not in _WAITING:
        raise Conflict(
            f"version {number} of {name} is {draft.phase or 'not evaluated yet'}, and only a version that waits or is"
            f" in canary can be promoted; `{_command('draft pin', speculator, number)}` serves it anyway"
        )
    if speculator.resource is not None and speculator.resource.promoted == number:
        return _unchanged(
            "promotedVersion", f"Version {number} of {name} is being promoted already; it is {draft.phase}."
        )
    follows = "all pods load it now, without further analysis and without a restart. Later versions are tried as usual."
    return _change(Verb.PROMOTE, speculator, "promotedVersion", follows, value=number, number=number)


def _check_servable(speculator: Speculator, drafts: Iterable[Draft], number: int) -> Draft:
    by_number = {draft.version: draft for draft in drafts}
    if number not in by_number:
        existing = f"versions {_ranges(sorted(by_number))}" if by_number else "no version yet"
        raise NotFound(f"{speculator.name} has no DraftVersion with the number {number}; it has {existing}")
    draft = by_number[number]
    if draft.phase in LOST:
        reason = f": {draft.reason}" if draft.reason else ""
        raise Conflict(f"version {number} of {speculator.name} is {draft.phase} and never serves again{reason}")
    return draft


def _ranges(numbers: list[int]) -> str:
    """Return `1 to 3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _pinned(speculator: Speculator) -> str:
    return f"{speculator.name} is pinned to {f'version {speculator.pinned}' if speculator.pinned else 'no draft'}"


def _unchanged(field: str, message: str) -> PatchFields:
    return PatchFields(field=field, value=None, message=message, is_change=False)


def _change(
    verb: Verb, speculator: Speculator, field: str, follows: str, *, value: Any, number: int | None = None
) -> PatchFields:
    message = decided(verb, speculator.name, number, follows)
    if speculator.resource is not None and speculator.resource.is_suspended:
        message = f"{message} It is suspended: this takes effect once spec.suspend is false."
    return PatchFields(field=field, value=value, message=message)


def _command(verb: str, speculator: Speculator, *words: object) -> str:
    return " ".join(map(str, ("kubectl updraft", verb, speculator.name, *words, "-n", speculator.namespace)))

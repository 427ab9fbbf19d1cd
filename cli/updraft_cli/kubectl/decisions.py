"""What a person may decide, and what follows: pure, from what the API server says now to the patch that has to be sent."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from updraft_chassis.errors import Conflict, NotFound
from updraft_cli.backends.objects import Speculator, Version

_CONDEMNED = ("rejected", "rolled back", "failed")
"""A version that lost is never served again, whoever asks."""

_WAITING = ("pending", "held", "canary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to set, and what to tell. Nothing to set: it is so already."""

    field: str
    """Of spec.rollout."""
    value: Any
    """None takes the field out, and with it our ownership of it."""
    told: str
    is_change: bool = True


def pin(found: Speculator, versions: Iterable[Version], number: int) -> Decision:
    """Serve exactly this version, or none (0)."""
    if number:
        _check_servable(found, versions, number)
    what = f"version {number}" if number else "no draft"
    undo = f"`{_command('unpin', found)}`"
    if found.wishes.pinned == number:
        return _already("pinnedVersion", f"{found.name} is pinned to {what} already; {undo} ends it.")
    if number == found.versions.stable:
        follows = "It serves already, and stays."
    elif number:
        follows = "All pods load it now, without analysis and without a restart."
    else:
        follows = "All pods go on without a draft, without a restart: the same answers, more slowly."
    told = f"{found.name} is pinned to {what}. {follows} Newer versions are held until {undo}."
    return Decision(field="pinnedVersion", value=number, told=_later(found, told))


def unpin(found: Speculator) -> Decision:
    """Let the registry choose again."""
    if found.wishes.pinned is None:
        return _already("pinnedVersion", f"{found.name} is not pinned.")
    told = (
        f"{found.name} is not pinned any more. The version that won last serves, and newer ones are tried again; no pod"
        " restarts."
    )
    return Decision(field="pinnedVersion", value=None, told=_later(found, told))


def pause(found: Speculator) -> Decision:
    """Freeze the rollout."""
    undo = f"`{_command('resume', found)}`"
    if found.wishes.paused:
        return _already("paused", f"{found.name} is paused already; {undo} goes on.")
    stays = (
        f"Version {found.versions.candidate} stays in canary on the pods that it has"
        if found.versions.candidate
        else ""
    )
    told = (
        f"{found.name} is paused. {stays or 'What serves goes on serving'}, and no new version is tried until {undo}."
        " A canary that fails is still rolled back."
    )
    return Decision(field="paused", value=True, told=_later(found, told))


def resume(found: Speculator) -> Decision:
    """Go on where it was paused."""
    if not found.wishes.paused:
        return _already("paused", f"{found.name} is not paused.")
    candidate = found.versions.candidate
    follows = f"The canary of version {candidate} goes on" if candidate else "New versions are tried again"
    # Taken out rather than set to false, which is the default: the field is then nobody's.
    return Decision(field="paused", value=None, told=_later(found, f"{found.name} is resumed. {follows}."))


def promote(found: Speculator, versions: Iterable[Version], number: int) -> Decision:
    """Let a version win now that waits or is tried."""
    version = _check_servable(found, versions, number)
    if version.phase == "stable":
        return _already("promotedVersion", f"Version {number} of {found.name} is stable already.")
    if (pinned := found.wishes.pinned) is not None:
        what = f"version {pinned}" if pinned else "no draft"
        raise Conflict(f"{found.name} is pinned to {what}: `{_command('unpin', found)}` first")
    if version.phase not in _WAITING:
        raise Conflict(
            f"version {number} of {found.name} is {version.phase or 'not judged yet'}, and only one that waits or is in"
            f" canary can be promoted; `{_command('pin', found, number)}` serves it all the same"
        )
    if found.wishes.promoted == number:
        return _already(
            "promotedVersion", f"Version {number} of {found.name} is to be promoted already; it is {version.phase}."
        )
    told = (
        f"Version {number} of {found.name} is promoted: all pods load it now, without further analysis and without a"
        " restart. Later versions are tried as usual."
    )
    return Decision(field="promotedVersion", value=number, told=_later(found, told))


def numbered(found: Speculator, said: int | str) -> int:
    """Return the number of a version that was named by number or by its role; Conflict if there is none."""
    if isinstance(said, int):
        return said
    number: int | None = getattr(found.versions, said)
    if number is None:
        raise Conflict(f"{found.name} has no {said} version now")
    return number


def _check_servable(found: Speculator, versions: Iterable[Version], number: int) -> Version:
    """Return the version; NotFound or Conflict where it cannot serve."""
    known = {version.number: version for version in versions if version.number is not None}
    if number not in known:
        has = f"versions {_ranges(sorted(known))}" if known else "no version yet"
        raise NotFound(f"{found.name} has no DraftVersion with the number {number}; it has {has}")
    version = known[number]
    if version.phase in _CONDEMNED:
        why = f": {version.reason}" if version.reason else ""
        raise Conflict(f"version {number} of {found.name} is {version.phase} and is never served again{why}")
    return version


def _ranges(numbers: list[int]) -> str:
    """Return `1 to 3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _already(field: str, told: str) -> Decision:
    return Decision(field=field, value=None, told=told, is_change=False)


def _later(found: Speculator, told: str) -> str:
    return f"{told} It is suspended: this counts once spec.suspend is false." if found.is_suspended else told


def _command(verb: str, found: Speculator, *words: object) -> str:
    return " ".join(map(str, ("kubectl updraft", verb, found.name, *words, "-n", found.namespace)))

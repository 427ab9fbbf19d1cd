"""The decisions of a person: which are possible now, and what each will do, said before it is done."""

from collections.abc import Iterator
from dataclasses import dataclass

from updraft_cli.backends.drafts import Draft
from updraft_cli.backends.protocol import Verb
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.backends.speculators import LOST, Speculator
from updraft_cli.ui.views.parts import version_name

WAITING = frozenset({"pending", "held", "canary"})
"""Phases of versions that can be promoted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A button that leads to a confirmation."""

    label: str
    href: str
    refusal: str = ""
    """Why it cannot be used now; empty if it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    title: str
    effects: tuple[str, ...]
    """Sentences: what will happen."""
    button: str
    verb: Verb
    version: int | None
    versions: tuple[tuple[int, str], ...] = ()
    """Versions to choose from, with a few words about each; empty: none is chosen."""
    refusal: str = ""


def actions(one: SpeculatorSnapshot, refusal: str) -> tuple[Action, ...]:
    """Return all buttons of a speculator. `refusal` is why this person may not decide; empty if they may."""
    return tuple(_actions(one, refusal))


def version_actions(one: SpeculatorSnapshot, draft: Draft, refusal: str) -> tuple[Action, ...]:
    """Return the buttons of one version."""
    number = draft.version
    pinned = f"version {number} is pinned already" if one.speculator.pinned == number else ""
    return (
        _action(one, "Pin this version", Verb.PIN, number, refusal or pinned or _unfit(one, Verb.PIN, number)),
        _action(one, "Promote this version", Verb.PROMOTE, number, refusal or _unfit(one, Verb.PROMOTE, number)),
    )


def confirmation(one: SpeculatorSnapshot, verb: Verb, version: int | None, refusal: str) -> Confirmation:
    """Describe a decision. Without a version, those that need one offer a choice."""
    is_about_one = verb in (Verb.PIN, Verb.PROMOTE)
    is_choice = is_about_one and version is None
    chosen = _default(one, verb) if is_choice else version
    title, button = _TITLES[verb]
    named = f": {version_name(version)}" if is_about_one and not is_choice else ""
    return Confirmation(
        title=f"{title} of {one.name}{named}" if not is_about_one else f"{title} for {one.name}{named}",
        effects=tuple(_effects(one.speculator, verb, chosen or 0, is_choice=is_choice)),
        button=button,
        verb=verb,
        version=chosen if is_about_one else None,
        versions=tuple(_choices(one, verb)) if is_choice else (),
        refusal=refusal or _impossible(one, verb, chosen),
    )


def _impossible(one: SpeculatorSnapshot, verb: Verb, number: int | None) -> str:
    """Return why a decision cannot be made now, whoever makes it; empty if it can."""
    speculator = one.speculator
    match verb:
        case Verb.PIN:
            return _unfit(one, verb, number) if number else ""
        case Verb.PROMOTE:
            return _NOTHING_WAITS if number is None else _unfit(one, verb, number)
        case Verb.UNPIN:
            return f"{one.name} is not pinned" if speculator.pinned is None else ""
        case Verb.PAUSE:
            return "the rollout is paused already" if speculator.paused else ""
        case Verb.RESUME:
            return "" if speculator.paused else "the rollout is not paused"


def _unfit(one: SpeculatorSnapshot, verb: Verb, number: int) -> str:
    """Return why a version is not one for this decision; empty if it is."""
    draft = one.draft(number)
    if draft is None:
        return f"{one.name} has no version {number}"
    if draft.phase in LOST:
        return f"version {number} is {draft.phase} and never serves again"
    if draft.pruned:
        return f"the weights of version {number} are no longer kept"
    return _unpromotable(one.speculator, draft, number) if verb is Verb.PROMOTE else ""


def _unpromotable(speculator: Speculator, draft: Draft, number: int) -> str:
    """Return why a version that could serve is not promoted: a cluster is stricter than a registry."""
    pinned, is_cluster = speculator.pinned, speculator.resource is not None
    if pinned is not None and (is_cluster or pinned != number):
        return f"{version_name(pinned)} is pinned; end the pin first"
    if draft.phase == "stable" and pinned is None:
        return f"version {number} is stable already"
    if is_cluster and draft.phase not in WAITING:
        return f"version {number} is {draft.phase or 'not evaluated yet'}, and only one that waits or is in canary is promoted"
    return ""


def _waiting(one: SpeculatorSnapshot) -> int | None:
    """Return the version to promote: the one in canary, else the newest that waits; None if none does."""
    waiting = [draft.version for draft in one.drafts if draft.phase in WAITING and not draft.pruned and draft.version]
    return one.speculator.candidate if one.speculator.candidate in waiting else next(iter(waiting), None)


_NOTHING_WAITS = "no version waits or is in canary"

_TITLES = {
    Verb.PIN: ("Pin a version", "Pin it"),
    Verb.UNPIN: ("End the pin", "End the pin"),
    Verb.PROMOTE: ("Promote a version", "Promote it"),
    Verb.PAUSE: ("Pause the rollout", "Pause"),
    Verb.RESUME: ("Resume the rollout", "Resume"),
}


def _actions(one: SpeculatorSnapshot, refusal: str) -> Iterator[Action]:
    speculator = one.speculator
    no_previous = "" if speculator.previous else "there is no previous version"
    is_there = speculator.pinned is not None and speculator.pinned == speculator.previous
    back = f"it is pinned to version {speculator.previous} already" if is_there else ""
    label = f"Roll back to version {speculator.previous}" if speculator.previous else "Roll back"
    yield _action(one, label, Verb.PIN, speculator.previous, refusal or no_previous or back)
    waiting = _waiting(one)
    label = "Promote" if waiting is None else f"Promote version {waiting}"
    yield _action(one, label, Verb.PROMOTE, waiting, refusal or _impossible(one, Verb.PROMOTE, waiting))
    empty = "" if one.drafts else "there is no version yet"
    yield _action(one, "Pin", Verb.PIN, None, refusal or empty)
    if speculator.pinned is not None:
        yield _action(one, "End the pin", Verb.UNPIN, None, refusal)
    verb, word = (Verb.RESUME, "Resume") if speculator.paused else (Verb.PAUSE, "Pause")
    yield _action(one, word, verb, None, refusal)


def _action(one: SpeculatorSnapshot, label: str, verb: Verb, version: int | None, refusal: str) -> Action:
    query = "" if version is None else f"?version={version}"
    return Action(label=label, href=f"/s/{one.name}/confirm/{verb}{query}", refusal=refusal)


def _default(one: SpeculatorSnapshot, verb: Verb) -> int | None:
    """Return the version that a form about `verb` begins with; None if there is none."""
    return _waiting(one) if verb is Verb.PROMOTE else one.speculator.stable


def _choices(one: SpeculatorSnapshot, verb: Verb) -> Iterator[tuple[int, str]]:
    if verb is Verb.PIN:
        yield 0, "no draft: the same answers, more slowly"
    for draft in one.drafts:
        is_offered = draft.phase in WAITING if verb is Verb.PROMOTE else draft.phase not in LOST
        if is_offered and not draft.pruned:
            length = f", {draft.acceptance.length:.2f} tokens per step" if draft.acceptance else ""
            yield draft.version, f"{draft.phase}{length}"


def _effects(speculator: Speculator, verb: Verb, number: int, *, is_choice: bool) -> Iterator[str]:
    stable, candidate = version_name(speculator.stable), speculator.candidate
    match verb:
        case Verb.PIN:
            yield from _pinning(speculator, number, is_choice=is_choice)
        case Verb.UNPIN:
            yield f"{speculator.name} is no longer pinned to {version_name(speculator.pinned)}."
            tried = (
                "none is tried until you resume the rollout" if speculator.paused else "newer versions are tried again"
            )
            yield f"The last promoted version serves, and {tried}. No pod restarts."
        case Verb.PROMOTE:
            yield "All pods load the version now, without further analysis and without a restart."
            yield f"It takes over from {stable}. Later versions are tried as usual."
        case Verb.PAUSE:
            stays = (
                f"Version {candidate} stays in canary on its pods"
                if candidate
                else f"{stable.capitalize()} keeps serving"
            )
            yield f"{stays}, and no new version is tried until you resume."
            yield "A canary that fails is still rolled back."
        case Verb.RESUME:
            yield _resuming(speculator)


def _resuming(speculator: Speculator) -> str:
    if speculator.pinned is not None:
        pinned = version_name(speculator.pinned)
        return f"The pause ends. {speculator.name} stays pinned to {pinned}, so newer versions are held until you end the pin."
    if speculator.candidate:
        return f"The canary of version {speculator.candidate} continues."
    return "New versions are tried again."


def _pinning(speculator: Speculator, number: int, *, is_choice: bool) -> Iterator[str]:
    yield f"Now {version_name(speculator.stable)} serves."
    if is_choice or number:
        chosen = "the version that you choose" if is_choice else f"version {number}"
        yield f"All pods load {chosen} now, without analysis and without a restart. No request ends."
    if is_choice or not number:
        yield "With no draft, all answers stay the same and come more slowly."
    if speculator.candidate and (is_choice or speculator.candidate != number):
        yield (
            f"The canary of version {speculator.candidate} ends, unless it is the one that you choose."
            if is_choice
            else (f"The canary of version {speculator.candidate} ends.")
        )
    yield "Newer versions are held until you end the pin."

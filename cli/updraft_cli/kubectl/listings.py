"""What the commands find, put together from the API server's objects."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from updraft_cli.backends import drafts, objects
from updraft_cli.backends.objects import Event, Json, Speculator, Version, newest_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculators:
    """The speculators of a place."""

    namespace: str
    """Empty: of all namespaces."""
    speculators: tuple[Speculator, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The versions of a speculator, or of all in a place, newest first."""

    namespace: str
    speculator: str
    """Empty: of all speculators."""
    pins: dict[str, int | None]
    """Pinned version by NAMESPACE/NAME."""
    versions: tuple[Version, ...]

    @property
    def place(self) -> str:
        """Where one has looked, in words."""
        if self.speculator:
            return f"{self.namespace}/{self.speculator}"
        return f"namespace {self.namespace}" if self.namespace else "any namespace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What happened to the versions of a speculator, oldest first."""

    namespace: str
    speculator: str
    changes: tuple[drafts.Event, ...]
    """Of phase, as the DraftVersions keep them."""
    events: tuple[Event, ...]
    complaint: str
    """Why there are no Events; empty when they could be read."""


def speculators(namespace: str, items: Iterable[Json]) -> Speculators:
    """Read AdaptiveSpeculators, by namespace and name."""
    found = sorted(map(objects.speculator, items), key=lambda s: (s.namespace, s.name))
    return Speculators(namespace=namespace, speculators=tuple(found))


def versions(namespace: str, owners: Iterable[Json], items: Iterable[Json], *, speculator: str = "") -> Versions:
    """Read DraftVersions, and from their speculators which are pinned."""
    found = map(objects.speculator, owners)
    return Versions(
        namespace=namespace,
        speculator=speculator,
        pins={f"{owner.namespace}/{owner.name}": owner.wishes.pinned for owner in found},
        versions=newest_first(map(objects.version, items)),
    )


def changes(versions: Iterable[Version]) -> tuple[drafts.Event, ...]:
    """Return all changes of phase, oldest first."""
    return tuple(sorted((change for version in versions for change in _changes(version)), key=lambda c: c.time))


def about(events: Iterable[Json], speculator: str, version: Version | None) -> tuple[Event, ...]:
    """Return the Events about a speculator and its versions, or about one of these; oldest first."""
    read = map(objects.event, events)
    if version is not None:
        kept = [event for event in read if (event.kind, event.name) == ("DraftVersion", version.name)]
    else:
        kept = [event for event in read if event.name == speculator or _is_version(event, speculator)]
    return tuple(sorted(kept, key=lambda event: event.time.timestamp() if event.time else 0.0))


def _is_version(event: Event, speculator: str) -> bool:
    """Told by the name, for a version may be gone while its Events are not."""
    number = event.name.removeprefix(f"{speculator}-v")
    return event.kind == "DraftVersion" and number != event.name and number.isdecimal()


def _changes(version: Version) -> Iterator[drafts.Event]:
    before = ""
    for moment in version.history:
        if moment.time is not None:
            yield drafts.Event(
                time=moment.time,
                version=version.number or 0,
                before=before,
                phase=moment.phase,
                reason=moment.reason,
                actor=moment.actor,
            )
        before = moment.phase

"""Which weights are kept: those of all versions that may serve soon, and of some history."""

from collections.abc import Collection

from updraft_registry.rollout.version import (
    NO_DRAFT,
    Speculator,
    Version,
    in_canary,
    newest_proven,
    number_of,
    stable,
)

_MEGABYTE = 10**6


def versions_to_keep(speculator: Speculator, in_use: Collection[int]) -> frozenset[int]:
    """Numbers of the versions whose weights are kept; `in_use` are those that a pod holds or was told to hold.

    The needed ones stay, and of the newest `revision_history_limit` that may still be served those that fit into
    `revision_history_megabytes` with them.
    """
    policy = speculator.desired.policy
    needed = _needed(speculator, in_use)
    room = policy.revision_history_megabytes * _MEGABYTE
    room -= sum(version.size_bytes for version in speculator.versions if version.number in needed)
    servable = [version for version in speculator.versions if not version.phase.is_condemned]
    kept = set(needed)
    for version in reversed(servable[-policy.revision_history_limit :]):
        if version.number not in needed:
            room -= version.size_bytes
            if policy.revision_history_megabytes and room < 0:
                break
            kept.add(version.number)
    return frozenset(kept)


def evictable(speculator: Speculator, in_use: Collection[int]) -> tuple[Version, ...]:
    """Versions whose weights a full volume may lose, the oldest first: all that are not needed."""
    needed = _needed(speculator, in_use)
    return tuple(version for version in speculator.versions if version.number not in needed)


def _needed(speculator: Speculator, in_use: Collection[int]) -> frozenset[int]:
    """Stable, previous, pinned, retained, waiting and canary versions, and those in use."""
    versions = speculator.versions
    serving = stable(versions)
    previous = newest_proven(versions, other_than=number_of(serving))
    needed = {version.number for version in versions if version.is_retained or version.phase.is_waiting}
    needed |= {version.number for version in (serving, previous, in_canary(versions)) if version is not None}
    return frozenset(needed.union(in_use, [speculator.desired.pinned or NO_DRAFT]))

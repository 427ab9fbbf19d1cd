"""Which weights are kept: those of all versions that may serve soon, and of some history."""

from collections.abc import Collection

from updraft_registry.rollout.version import NO_DRAFT, Speculator, in_canary, newest_proven, number_of, stable


def versions_to_keep(speculator: Speculator, in_use: Collection[int]) -> frozenset[int]:
    """Numbers of the versions whose weights are kept; `in_use` are those that a pod holds or was told to hold.

    Stable, previous, pinned, retained, waiting and canary versions stay, and the newest `revision_history_limit` that may
    still be served.
    """
    versions = speculator.versions
    serving = stable(versions)
    previous = newest_proven(versions, other_than=number_of(serving))
    servable = [version.number for version in versions if not version.phase.is_condemned]
    history = servable[-speculator.desired.policy.revision_history_limit :]
    kept = {version.number for version in versions if version.is_retained or version.phase.is_waiting}
    kept |= {version.number for version in (serving, previous, in_canary(versions)) if version is not None}
    return frozenset(kept.union(history, in_use, [speculator.desired.pinned or NO_DRAFT]))

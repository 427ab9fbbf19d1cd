"""Limits that are too small for any draft to be published: the trainer's, and those that only others know."""

from kubernetes.utils.quantity import parse_quantity

from updraft.registry.v1 import registry_pb2 as pb
from updraft_artifacts.sizing import quantity, redis_too_small, registry_limit, registry_needs
from updraft_operator.api.speculator import Redis, RedisStorage
from updraft_operator.manifests.dedicated import redis as dedicated
from updraft_operator.manifests.redis import OURS, Place, wanted_place
from updraft_operator.planning.observed import Observed, learning_of

_FILE_SYSTEM = 1.1
"""Size of a claim over what its file system has room for."""


def too_small(observed: Observed) -> str:
    """One sentence that names what to enlarge; empty if nothing is too small, or nobody has reported."""
    learning = learning_of(observed.registry.state)
    return (
        (learning.too_small if learning is not None else "")
        or _registry_limit(observed.registry.state, learning)
        or _registry_volume(observed, learning)
        or _redis_memory(observed, learning)
        or _redis_volume(observed)
    )


def _registry_limit(state: pb.SpeculatorState | None, learning: pb.Learning | None) -> str:
    """Why the registry would refuse every version of the trainer; empty if it would not."""
    if state is None or learning is None:
        return ""
    problem = registry_limit(state.max_draft_bytes, learning.version_bytes)
    return f"{problem} in spec.registry.env" if problem else ""


def _registry_volume(observed: Observed, learning: pb.Learning | None) -> str:
    """Why the registry could not even store the versions in use; empty if it can, or if its volume has no size.

    The volume's size is what the registry sees, because a claim is expanded without a change of the spec.
    """
    state = observed.registry.state
    volume_bytes = state.volume_bytes if state is not None else 0
    published = max((version.manifest.size_bytes for version in observed.registry.versions), default=0)
    num_bytes = published or (learning.version_bytes if learning is not None else 0)
    needed, problem = registry_needs(volume_bytes, num_bytes)
    size = quantity(int(_FILE_SYSTEM * needed))
    advice = f"expand the claim itself to at least {size}, because spec.registry.storage cannot change"
    return f"{problem}: {advice}" if problem else ""


def _redis_memory(observed: Observed, learning: pb.Learning | None) -> str:
    """Why the operator's Redis may refuse traces; empty if it has room, or if its memory is not known.

    The trainer may not ask it: the answer would tell how much others store.
    """
    if learning is None or wanted_place(observed.speculator, observed.config) not in OURS:
        return ""
    return redis_too_small(observed.redis_max_memory, learning.stream_bytes)


def _redis_volume(observed: Observed) -> str:
    """Why the log of a dedicated Redis may fill its volume, after which it refuses all writes."""
    owner = observed.speculator
    storage = (owner.spec.traces.redis or Redis()).storage or RedisStorage()
    if wanted_place(owner, observed.config) is not Place.DEDICATED or storage.claim_name is not None:
        return ""
    needed = 2 * dedicated.max_memory(owner)
    if parse_quantity(storage.size) >= needed:
        return ""
    return f"spec.traces.redis.storage.size is {storage.size}, but the log of this Redis needs {quantity(needed)}"

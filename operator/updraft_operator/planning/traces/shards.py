"""How many streams a speculator has: never fewer than its pods write to."""

from updraft_chassis.streams import MAX_SHARDS
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.planning.observed import Observed


def with_streams(observed: Observed) -> AdaptiveSpeculator:
    """The resource with no fewer streams than it has, unless the spec has a number: nobody would read the others, to which pods
    write until they have restarted."""
    owner = observed.speculator
    if owner.spec.traces.shards is not None:
        return owner
    shards = max(_num_streams(observed), owner.spec.num_shards)
    traces = owner.spec.traces.model_copy(update={"shards": shards})
    return owner.model_copy(update={"spec": owner.spec.model_copy(update={"traces": traces})})


def _num_streams(observed: Observed) -> int:
    """As many as the pods use: what both sides say, so that an edit of one ConfigMap by hand is undone."""
    used = []
    for part, prefix in ((names.TRAINER, "UPDRAFT_TRAINER"), (names.SERVING, "UPDRAFT_INFERENCE")):
        child = observed.child("ConfigMap", part)
        data = (child.live().get("data") or {}) if child is not None else {}
        value = data.get(f"{prefix}_STREAM_SHARDS", "")
        used += [int(value)] if value.isdecimal() and len(value) < len(str(10 * MAX_SHARDS)) else []
    return min(*used, MAX_SHARDS) if used else 1

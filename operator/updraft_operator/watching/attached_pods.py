"""Pods of other workloads, listed by their labels when a speculator is looked at, at most every `FRESH_S` seconds.

Refused: a watch of all pods (a cluster has a hundred thousand), and a watch per speculator (a connection each, although a
change may as well be seen 15 s later: serving does not depend on it).
"""

from updraft_chassis.clock import Clock
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.planning.objects import Key
from updraft_operator.planning.plan import ATTACHED_S
from updraft_operator.planning.pods import AttachedPod
from updraft_operator.planning.serving.attached import attached_pod
from updraft_operator.watching.cluster import Cluster

FRESH_S = ATTACHED_S / 3


class AttachedPods:
    """Lists the pods that speculators are attached to."""

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        self._listed: dict[Key, tuple[float, int, tuple[AttachedPod, ...]]] = {}
        """When, for which generation of the spec, and what was found."""

    async def read(self, key: Key, owner: AdaptiveSpeculator) -> tuple[AttachedPod, ...]:
        """The pods that the spec selects; none if it selects none."""
        attached, now_s = owner.spec.serving.attached, self._clock.monotonic()
        if attached is None:
            return ()
        at_s, generation, pods = self._listed.get(key, (float("-inf"), 0, ()))
        if generation == owner.metadata.generation and now_s - at_s < FRESH_S:
            return pods
        listed = await self._cluster.pods(key.namespace, attached.selector.text)
        pods = tuple(attached_pod(body, owner) for body in listed)
        self._listed[key] = (now_s, owner.metadata.generation, pods)
        return pods

    def forget(self, key: Key) -> None:
        self._listed.pop(key, None)

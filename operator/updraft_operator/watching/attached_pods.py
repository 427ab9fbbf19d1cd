"""Pods of other workloads, listed by their labels when a speculator is looked at, at most every `FRESH_S` seconds.

Refused: a watch of all pods (a cluster has a hundred thousand), and a watch per speculator (a connection each, although a
change may as well be seen 15 s later: serving does not depend on it).
"""

import logging
from dataclasses import replace

from updraft_chassis.clock import Clock
from updraft_chassis.errors import UpdraftError
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.planning.objects import Key
from updraft_operator.planning.plan import ATTACHED_S
from updraft_operator.planning.pods import Selection
from updraft_operator.planning.serving.attached import attached_pod, is_worker
from updraft_operator.watching.cluster import Cluster

logger = logging.getLogger(__name__)

FRESH_S = ATTACHED_S / 3


class AttachedPods:
    """Lists the pods that speculators are attached to."""

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        self._listed: dict[Key, tuple[float, int, Selection]] = {}
        """When, for which generation of the spec, and what was found."""

    async def read(self, key: Key, owner: AdaptiveSpeculator) -> Selection:
        """The pods that the spec selects; none if it selects none, or while it is deleted. A failure is a fact like others:
        registry and trainer do not depend on these pods."""
        attached, now_s = owner.spec.serving.attached, self._clock.monotonic()
        if attached is None or owner.metadata.deletion_timestamp is not None:
            return Selection()
        at_s, generation, found = self._listed.get(key, (float("-inf"), 0, Selection()))
        if generation == owner.metadata.generation and now_s - at_s < FRESH_S:
            return found
        try:
            listed = await self._cluster.pods(key.namespace, attached.selector.text)
        except UpdraftError as error:
            logger.info("Pods not listed", extra={"speculator": str(key), "error": str(error)})
            found = replace(found, problem=str(error))
        else:
            theirs = [body for body in listed if names.SPECULATOR not in body["metadata"].get("labels", {})]
            servers = [body for body in theirs if not is_worker(body)]
            found = Selection(pods=tuple(attached_pod(body, owner, self._clock.now()) for body in servers))
        self._listed[key] = (now_s, owner.metadata.generation, found)
        return found

    def forget(self, key: Key) -> None:
        self._listed.pop(key, None)

"""Changes that wait for the certificates of servers."""

from collections.abc import Collection

from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.tls import metrics
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import CertificateOrder
from updraft_operator.planning.objects import Ref
from updraft_operator.planning.observed import Observed

_OF_PODS = ("Deployment", "StatefulSet", "LeaderWorkerSet", "ConfigMap")
"""Kinds with templates of pods, and with what pods read when they start."""


def is_held(new: Manifest, observed: Observed, orders: Collection[CertificateOrder]) -> bool:
    """Whether a change waits for a certificate of a server: pods of the new template could not start, and those that run
    can. New objects do not wait: their pods wait for what they mount.

    The CAs change once that certificate has been signed again, or else clients might distrust it.
    """
    target, config = Ref(new["kind"], new["metadata"]["name"]), observed.config
    child, cas = observed.children.get(target), Ref("ConfigMap", tls.ca_name(observed.name))
    if child is None or not config.tls.is_on or observed.is_preview or target.kind not in _OF_PODS:
        return False
    if target == cas:
        return bool(orders)
    needed = {part for part in (names.REGISTRY, names.REDIS) if target.name == names.child(observed.name, part)}
    if names.REDIS not in needed:
        if cas not in observed.children:
            return True
        if not tls.is_used(child.live()):
            needed.add(names.REGISTRY)
        if metrics.is_used(new):
            needed.add(names.METRICS)
    return not all(tls.is_ready(observed.speculator, config, observed.certificates, part) for part in needed)

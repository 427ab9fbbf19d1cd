"""Where the pods of each role are pointed, and moves to another Redis.

A move loses no trace. The pods that write go first, once the new Redis has their user. The trainer follows when none of them
writes to the former Redis any more and the trainer has settled everything that is there. The former Redis is left last.
Everything follows from what exists: pod templates name the Secret of a Redis, so an operator that was killed goes on where the
former one was.

A Redis that the spec names is left at once, because nobody but the spec knows its address.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator, RedisMode
from updraft_operator.manifests import ranks
from updraft_operator.manifests.dedicated import redis as dedicated
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.manifests.redis import OURS, Place, secret_name, wanted_place
from updraft_operator.manifests.redis_users import Role
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import Tls
from updraft_operator.planning import trainers
from updraft_operator.planning.objects import Child, Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.pods import AttachedPod

_NOT_READY = "the new Redis has to be ready and to have their users"
_PARTS = {Role.WRITER: names.SERVING, Role.READER: names.TRAINER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """One decision. Places are None without a Redis."""

    wanted: Place | None
    """By the spec."""
    targets: dict[Role, Place]
    """Where the templates of a role are to point."""
    is_settled: bool
    """Whether every pod is where the spec wants it."""
    drains: Place | None = None
    """Where traces are left that the trainer has to read, and nobody writes any more."""
    waits: str = ""
    """The next thing that a move needs, in a clause; empty without a move."""

    @property
    def in_use(self) -> tuple[Place, ...]:
        """Those of the operator's that pods are pointed to, or will be."""
        return tuple(place for place in OURS if place in (self.wanted, *self.targets.values()))


def places(observed: Observed) -> Places:
    wanted = wanted_place(observed.speculator, observed.config)
    if wanted is None:
        return Places(wanted=None, targets={}, is_settled=True)
    reader_now = next(iter(_pointed_now(observed, Role.READER)), None)
    writer_now = _writer_now(observed, reader_now)
    if reader_now is None and writer_now in OURS:
        reader_now = writer_now  # a trainer that is missing begins where it would be
    goal = wanted
    if writer_now in OURS and reader_now in OURS and writer_now is not reader_now:
        goal = writer_now  # a move that has begun is completed first: nobody would read what was written there
    assert goal is not None
    writer = goal if writer_now not in OURS or _takes(observed, goal) else writer_now
    assert writer is not None
    is_settled = all(now in (None, wanted) for now in (writer_now, reader_now)) and all(
        is_rolled_out(observed, role) for role in Role
    )
    if reader_now not in OURS or reader_now is goal:
        if is_settled and (former := _left(observed, wanted)) is not None:
            return _leaving(observed, wanted, former)
        return Places(
            wanted=wanted,
            targets={Role.WRITER: writer, Role.READER: goal},
            is_settled=is_settled,
            waits="" if writer is goal else _not_ready(observed),
        )
    assert reader_now is not None
    has_left = _nobody_writes_elsewhere(observed, writer_now, goal)
    is_drained = has_left and observed.unread == 0
    return Places(
        wanted=wanted,
        targets={Role.WRITER: writer, Role.READER: goal if is_drained else reader_now},
        is_settled=False,
        drains=reader_now if has_left else None,
        waits=_for_reader(observed, has_left=has_left) if writer is goal else _not_ready(observed),
    )


def _left(observed: Observed, wanted: Place) -> Place | None:
    """A Redis that nobody is pointed to and that may hold traces, as after a trainer that was deleted during a move."""
    if wanted is not Place.DEDICATED and observed.child("StatefulSet", names.REDIS) is not None:
        return Place.DEDICATED if observed.dedicated_url else None
    return Place.SHARED if wanted is not Place.SHARED and observed.redis_url and observed.unread else None


def _leaving(observed: Observed, wanted: Place, former: Place) -> Places:
    """The trainer goes back if traces are left there. What was not counted is not deleted."""
    reader = former if observed.unread else wanted
    return Places(
        wanted=wanted,
        targets={Role.WRITER: wanted, Role.READER: reader},
        is_settled=observed.unread == 0,
        drains=former,
        waits=_for_reader(observed, has_left=True),
    )


def server(observed: Observed, decided: Places) -> list[Manifest]:
    """The objects of a dedicated Redis to write. One that is being left stays as it is, because the spec does not say any more
    how it was set up. Before it is deleted, its volume is handed to it, so that no prompt stays there."""
    if not observed.dedicated_url:
        return []
    if is_dedicated(observed):
        policy = observed.speculator.spec.deletion_policy.value
        return dedicated.objects(observed.speculator, observed.config, observed.dedicated_url, when_deleted=policy)
    live = observed.child("StatefulSet", names.REDIS)
    if live is None or not decided.is_settled or _has_own_claim(observed):
        return []
    return [dedicated.with_volume(observed.speculator, live.live())]


def reachable(url: str, speculator: str, children: Mapping[Ref, Child]) -> str:
    """The address of a dedicated Redis as it is set up now: one that runs without TLS waits for its certificate."""
    live = children.get(Ref("StatefulSet", names.child(speculator, names.REDIS)))
    if live is None or tls.is_used(live.live()) or not url.startswith("rediss:"):
        return url
    return urlunsplit(urlsplit(url)._replace(scheme="redis", query=""))


def left_server(observed: Observed, decided: Places) -> set[Ref]:
    """Objects of a dedicated Redis that is being left and is still needed."""
    is_needed = bool(observed.dedicated_url) and not (decided.is_settled and _has_own_claim(observed))
    if is_dedicated(observed) or not is_needed or observed.child("StatefulSet", names.REDIS) is None:
        return set()
    return {Ref(kind, names.child(observed.name, names.REDIS)) for kind in dedicated.KINDS}


def tls_servers(observed: Observed) -> tuple[str, ...]:
    """The parts of the resource that have certificates."""
    has_redis = bool(observed.dedicated_url)
    return servers_of(observed.speculator, observed.config.tls, observed.children, has_dedicated=has_redis)


def servers_of(
    owner: AdaptiveSpeculator, own: Tls, children: Collection[Ref], *, has_dedicated: bool
) -> tuple[str, ...]:
    """The same before everything is observed: a dedicated Redis has one from when it is wanted until it is gone."""
    if not own.is_on:
        return ()
    is_there = Ref("StatefulSet", names.child(owner.metadata.name, names.REDIS)) in children
    has_redis = has_dedicated and (_wants_dedicated(owner) or is_there)
    return (
        names.REGISTRY,
        *((names.REDIS,) if has_redis else ()),
        *((names.METRICS,) if own.is_on_for_metrics else ()),
    )


def is_dedicated(observed: Observed) -> bool:
    return _wants_dedicated(observed.speculator)


def _wants_dedicated(owner: AdaptiveSpeculator) -> bool:
    redis = owner.spec.traces.redis
    return redis is not None and redis.mode is RedisMode.DEDICATED


def workloads(observed: Observed, role: Role) -> tuple[Child, ...]:
    """The objects that run the pods of a role."""
    if role is Role.READER:
        return trainers.workloads(observed)
    serving = observed.child("Deployment", names.SERVING)
    return () if serving is None else (serving,)


def is_rolled_out(observed: Observed, role: Role) -> bool:
    """Whether all pods of a role, also those that end, have the current template. Attached pods have none: they must be at one
    Redis."""
    children, attached = workloads(observed, role), {pod.state.name for pod in observed.attached.pods}
    num_pods = sum(not pod.is_finished and pod.name not in attached for pod in observed.pods_of(_PARTS[role]))
    if role is Role.WRITER and len(_pointed_now(observed, role)) > 1:
        return False
    return all(map(has_current_template, children)) and num_pods <= sum(
        child.status.get("replicas", 0) for child in children
    )


def pointed(speculator: str, children: Mapping[Ref, Child], attached: Iterable[AttachedPod]) -> frozenset[Place]:
    """Those of the operator's Redis that live templates and attached pods name."""
    refs = [Ref("Deployment", names.child(speculator, names.SERVING))]
    refs += [Ref(kind, ranks.workload(speculator, kind)) for kind in ranks.Kind]
    found = {name for ref in refs if ref in children for name in children[ref].redis_secrets}
    found |= {name for pod in attached for name in pod.redis_secrets}
    return frozenset(place for place in OURS if found & {secret_name(speculator, role, place) for role in Role})


def has_current_template(child: Child) -> bool:
    """Whether all pods that a workload counts have its current template."""
    is_seen = child.status.get("observedGeneration", child.generation) == child.generation
    is_whole = child.status.get("updatedReplicas", 0) == child.status.get("replicas", 0)
    return bool(is_seen and is_whole)


def _writer_now(observed: Observed, reader_now: Place | None) -> Place | None:
    """Where pods write. Attached pods follow one by one, when people restart them: the first one counts. None without any."""
    found = _pointed_now(observed, Role.WRITER)
    return min(found - {reader_now}, default=reader_now if reader_now in found else None)


def _nobody_writes_elsewhere(observed: Observed, writer_now: Place | None, goal: Place) -> bool:
    is_known = observed.speculator.spec.serving.is_attached and not observed.attached.problem
    has_none = is_known and writer_now is None
    return (writer_now is goal or has_none) and is_rolled_out(observed, Role.WRITER)


def _pointed_now(observed: Observed, role: Role) -> frozenset[Place]:
    """Where the live templates of a role point, without Redis that the operator has no more. Of attached pods, only what is
    the operator's counts: one that a spec named before is left at once."""
    exists = {Place.SHARED: bool(observed.redis_url), Place.DEDICATED: bool(observed.dedicated_url)}
    known = {secret_name(observed.name, role, place): place for place in OURS if exists[place]}
    gone = {secret_name(observed.name, role, place) for place in OURS} - known.keys()
    own = {name for child in workloads(observed, role) for name in child.redis_secrets[:1]} - gone
    attached = [pod for pod in observed.attached.pods if role is Role.WRITER and not pod.state.is_finished]
    theirs = {name for pod in attached for name in pod.redis_secrets} & known.keys()
    return frozenset(known.get(name, Place.NAMED) for name in own | theirs)


def _takes(observed: Observed, place: Place) -> bool:
    """Whether a Redis can take traces: it runs, and has the users."""
    return place not in OURS or place in observed.ready_places


def _has_own_claim(observed: Observed) -> bool:
    """Whether Kubernetes deletes the volume with the StatefulSet; also if there is no volume of its own."""
    pod = f"{names.child(observed.name, names.REDIS)}-0"
    claim = observed.children.get(Ref("PersistentVolumeClaim", names.claim(pod)))
    owners = [] if claim is None else claim.live()["metadata"].get("ownerReferences") or []
    return claim is None or any(owner.get("kind") == "StatefulSet" for owner in owners)


def server_problem(observed: Observed) -> str:
    """Why the pod of a dedicated Redis does not run, in a clause; empty if nothing says so."""
    found = next((pod.problem for pod in observed.pods_of(names.REDIS) if pod.problem is not None), None)
    return "" if found is None else f"; its pod: {found.message}"


def _not_ready(observed: Observed) -> str:
    return f"{_NOT_READY}{server_problem(observed)}"


def _for_reader(observed: Observed, *, has_left: bool) -> str:
    if not has_left:
        who = "attached pods" if observed.speculator.spec.serving.is_attached else "pods"
        return f"{who} that write to the former Redis have to be replaced"
    if observed.unread is None:
        return "the former Redis has to say what is left there, for which the operator's user may have to run XLEN"
    return f"the trainer has to read {observed.unread:,} traces in the former Redis first" if observed.unread else ""

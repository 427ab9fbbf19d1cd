"""Observe, plan, carry out: the same for every speculator, whatever happened to it."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Conflict, Forbidden, InvalidInput, NotFound, UpdraftError
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import Manifest, Surroundings, digest
from updraft_operator.manifests.registry import ROLES
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key, Ref
from updraft_operator.planning.observed import Access, Observed, Refusal
from updraft_operator.planning.plan import Call, Event, Plan, hash_of, plan, ref
from updraft_operator.planning.policy import policy
from updraft_operator.registry_connections import Address, Links
from updraft_operator.watching.cluster import KINDS, Cluster
from updraft_operator.watching.secrets import Secrets, fresh_tokens
from updraft_operator.watching.store import Known, Store
from updraft_operator.watching.traces import delete_traces

logger = logging.getLogger(__name__)

_REPORTER = names.MANAGER

_FORBIDDEN = {"exceeded quota": "QuotaExceeded", "because it is being terminated": "NamespaceTerminating"}
"""Why something is forbidden to everyone, by the API server's words."""


@dataclass(slots=True)
class _Memory:
    """What is remembered of a speculator between looks; all of it can be lost."""

    refusals: dict[Ref, Refusal] = field(default_factory=dict)
    settled: dict[Ref, tuple[str, str]] = field(default_factory=dict)
    status_due_s: float = float("-inf")
    ending_s: float | None = None
    """When it was first seen to be deleted."""
    said: frozenset[str] = frozenset()
    """What a dry run said last."""
    fresh_tokens: dict[str, str] = field(default_factory=dict)
    """Those that wait to be in the Secret: the same at every look, for pod templates depend on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What a reconciliation works with."""

    store: Store
    cluster: Cluster
    secrets: Secrets
    links: Links
    metrics: Metrics
    clock: Clock
    around: Surroundings
    redis_url: str
    registry_address: str
    """Template, with {name} and {namespace}."""
    status_s: float = 30.0
    """Least time between two writes of a status in which only measurements changed."""
    cleanup_s: float = 60.0
    """How long a deletion may wait for what is outside the cluster."""
    is_dry_run: bool = False
    guard: Callable[[], None] = lambda: None
    """Raises where this process may not write (any more)."""


class Reconciler:
    """Stateless but for what the API server refused, which is not asked for again and again."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._memories: dict[Key, _Memory] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Look once and do what follows; return after how long to look again, if nothing happens before."""
        known = self._wiring.store.known(key)
        if known.speculator is None:
            self._forget(key)
            return None
        seen = await self.observe(key, known)
        made = self._plan(seen)
        if self._wiring.is_dry_run:
            self._say_plan(key, made)
            return None
        if await self._carry_out(key, seen, made):
            known = self._wiring.store.known(key)
            if known.speculator is None:  # it went meanwhile
                self._forget(key)
                return None
            seen = await self.observe(key, known)
            made = self._plan(seen)
        await self._tell(key, seen, made)
        self._wiring.metrics.tell(key, seen.speculator.status.conditions)
        return made.again_s

    def retry_refused(self) -> None:
        """Ask again for what was refused: a quota may have grown, a foreign object may be gone."""
        for memory in self._memories.values():
            memory.refusals.clear()

    async def observe(self, key: Key, known: Known) -> Observed:
        """All that is known, in one piece."""
        wiring, memory = self._wiring, self._memory(key)
        assert known.speculator is not None
        memory.settled = {where: said for where, said in memory.settled.items() if where in known.children}
        if known.speculator.metadata.deletion_timestamp is not None and memory.ending_s is None:
            memory.ending_s = wiring.clock.monotonic()
        found = await wiring.secrets.look(key, known.speculator)
        missing = fresh_tokens(role for role in ROLES if not found.access.tokens.get(role))
        memory.fresh_tokens = {role: memory.fresh_tokens.get(role, token) for role, token in missing.items()}
        self._listen(key, known, known.speculator, found.access)
        return Observed(
            speculator=known.speculator,
            around=wiring.around,
            children=known.children,
            pods=known.pods,
            drafts=known.drafts,
            registry=wiring.links.view(key),
            access=found.access,
            redis_url=wiring.redis_url,
            fresh_tokens=memory.fresh_tokens,
            missing_secrets=found.missing,
            refusals=tuple(memory.refusals.values()),
            settled=dict(memory.settled),
            status_due_s=memory.status_due_s,
            ending_s=memory.ending_s,
            cleanup_s=wiring.cleanup_s,
        )

    def _listen(self, key: Key, known: Known, owner: AdaptiveSpeculator, access: Access) -> None:
        """To the registry, while its pod is ready: asking one that is not there says nothing."""
        workload = known.children.get(Ref("StatefulSet", names.child(key.name, names.REGISTRY)))
        is_there = workload is not None and workload.status.get("readyReplicas", 0) > 0
        token = access.tokens.get("operate", "")
        if not is_there or not token or owner.metadata.deletion_timestamp is not None:
            self._wiring.links.want(key, None)
            return
        address = self._wiring.registry_address.format(name=key.name, namespace=key.namespace)
        self._wiring.links.want(key, Address(address=address, token=token))

    def _plan(self, seen: Observed) -> Plan:
        return plan(seen, now_unix_s=self._wiring.clock.now(), now_s=self._wiring.clock.monotonic())

    def _say_plan(self, key: Key, made: Plan) -> None:
        """Log what would be done, once."""
        would = {f"apply {'/'.join(ref(each))}" for each in made.apply}
        would |= {f"delete {'/'.join(each)}" for each in made.delete}
        would |= {f"tell the registry {call.verb} {call.version or ''}".strip() for call in made.calls}
        memory = self._memory(key)
        for each in sorted(would - memory.said):
            logger.info("Would %s", each, extra={"speculator": str(key)})
        memory.said = frozenset(would)

    async def _carry_out(self, key: Key, seen: Observed, made: Plan) -> bool:
        """Objects, then calls, then the finalizer; whether anything was done."""
        for content in made.apply:
            await self._apply(key, seen, content)
        for each in made.delete:
            logger.info("Deleting", extra={"speculator": str(key), "object": "/".join(each)})
            await self._wiring.cluster.delete(each.kind, key.namespace, each.name)
            self._wiring.store.drop(each.kind, key, each.name)
        for call in made.calls:
            await self._call(key, seen, call)
        if made.cleans_up:
            self._wiring.guard()
            await delete_traces(self._wiring.secrets, self._wiring.redis_url, seen.speculator)
        if made.finalizer:
            await self._set_finalizer(key, seen, has_it=made.finalizer == "add")
        return bool(made.apply or made.delete or made.calls or made.finalizer)

    async def _apply(self, key: Key, seen: Observed, content: Manifest) -> None:
        wiring, memory, where = self._wiring, self._memory(key), ref(content)
        mark = "" if where.kind in ("Secret", "DraftVersion") else hash_of(content)
        try:
            await self._check_owner(seen, where)
            known = seen.children.get(where)
            answer = await wiring.cluster.apply(content)
        except (InvalidInput, Conflict, Forbidden) as error:
            memory.refusals[where] = _refused(where, mark, error)
            logger.warning("Refused", extra={"speculator": str(key), "object": "/".join(where), "error": str(error)})
            return
        memory.refusals.pop(where, None)
        version = answer["metadata"]["resourceVersion"]
        if where.kind == "Secret":
            wiring.secrets.forget(key)
            return
        wiring.store.put(where.kind, answer)
        if mark:
            memory.settled[where] = (mark, version)
        if known is not None and known.applied == mark and known.resource_version != version:
            wiring.metrics.drift.labels(where.kind).inc()
            logger.info("Set right", extra={"speculator": str(key), "object": "/".join(where)})

    async def _check_owner(self, seen: Observed, where: Ref) -> None:
        """Conflict for an object that is there and not ours: it is never taken over silently."""
        known = seen.children.get(where)
        owner, metadata = seen.speculator.metadata, {}
        if known is not None:
            if known.owner_uid in ("", owner.uid) or where.kind == "Job":
                return
            metadata = known.live()["metadata"]
        else:
            try:
                metadata = (await self._wiring.cluster.get(where.kind, owner.namespace, where.name))["metadata"]
            except NotFound:
                return
        if problem := _foreign(metadata, seen):
            raise Conflict(f"{where.kind} {where.name} is there already and {problem}")

    async def _call(self, key: Key, seen: Observed, call: Call) -> None:
        rollout = policy(seen.speculator.spec.rollout)
        self._wiring.guard()
        try:
            await self._wiring.links.call(key, call, rollout)
        except (InvalidInput, Conflict, NotFound) as error:
            refusal = Refusal(ref=call.ref, digest=call.digest, reason="InvalidRollout", message=str(error))
            self._memory(key).refusals[call.ref] = refusal
            logger.warning(
                "The registry refused", extra={"speculator": str(key), "call": call.verb, "error": str(error)}
            )
            return
        self._memory(key).refusals.pop(call.ref, None)
        logger.info("Told the registry", extra={"speculator": str(key), "call": call.verb, "version": call.version})

    async def _set_finalizer(self, key: Key, seen: Observed, *, has_it: bool) -> None:
        metadata = seen.speculator.metadata
        others = [each for each in metadata.finalizers if each != names.FINALIZER]
        wished = [*others, names.FINALIZER] if has_it else others
        patch = {"metadata": {"finalizers": wished, "resourceVersion": metadata.resource_version}}
        try:
            answer = await self._wiring.cluster.merge("AdaptiveSpeculator", key.namespace, key.name, patch)
        except NotFound:
            return
        self._wiring.store.put("AdaptiveSpeculator", answer)

    async def _tell(self, key: Key, seen: Observed, made: Plan) -> None:
        """Status and events; an object that is gone needs none, and the others get theirs."""
        told = [("DraftVersion", name, status) for name, status in made.draft_statuses]
        if made.status is not None:
            told.insert(0, ("AdaptiveSpeculator", key.name, made.status))
            self._memory(key).status_due_s = self._wiring.clock.monotonic() + self._wiring.status_s
        gone: set[tuple[str, str]] = set()
        for kind, name, status in told:
            try:
                answer = await self._wiring.cluster.apply(_status(key, kind, name, status), is_status=True)
            except NotFound:
                gone.add((kind, name))
            else:
                self._wiring.store.put(kind, answer)
        for event in made.events:
            if (event.kind, event.name) not in gone:
                await self._say(key, event)

    async def _say(self, key: Key, event: Event) -> None:
        """Tell what happened; an Event is news, and no work fails for want of it."""
        now = datetime.fromtimestamp(self._wiring.clock.now(), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        name = f"{event.name}.{digest({'reason': event.reason, 'message': event.message, 'uid': event.uid, 'at': now})}"
        content = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": key.namespace},
            "involvedObject": {
                "apiVersion": names.API_VERSION,
                "kind": event.kind,
                "name": event.name,
                "namespace": key.namespace,
                "uid": event.uid,
            },
            "reason": event.reason,
            "message": event.message,
            "type": "Warning" if event.is_warning else "Normal",
            "source": {"component": _REPORTER},
            "reportingComponent": _REPORTER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._wiring.cluster.create(content)
        except UpdraftError as error:
            logger.info("Event not told", extra={"speculator": str(key), "reason": event.reason, "error": str(error)})

    def _forget(self, key: Key) -> None:
        self._wiring.links.want(key, None)
        self._wiring.secrets.forget(key)
        self._wiring.metrics.forget(key)
        self._memories.pop(key, None)

    def _memory(self, key: Key) -> _Memory:
        return self._memories.setdefault(key, _Memory())


def _refused(where: Ref, mark: str, error: UpdraftError) -> Refusal:
    text = str(error)
    if isinstance(error, Conflict):
        reason = "NameConflict"
    elif isinstance(error, Forbidden):
        reason = next((reason for said, reason in _FORBIDDEN.items() if said in text), "Forbidden")
    else:
        reason = "InvalidPodTemplate"
    return Refusal(ref=where, digest=mark, reason=reason, message=text[:1500])


def _foreign(metadata: dict[str, Any], seen: Observed) -> str:
    """Why an object is somebody else's; empty if it is ours, or nobody's and marked for us."""
    owners: Iterable[dict[str, Any]] = metadata.get("ownerReferences") or ()
    for owner in owners:
        is_same = owner.get("kind") in ("AdaptiveSpeculator", "DraftVersion") and owner.get("name") == seen.name
        if owner.get("controller") and owner.get("uid") != seen.speculator.metadata.uid and not is_same:
            return f"belongs to {owner.get('kind')} {owner.get('name')}"
    if any(owner.get("uid") == seen.speculator.metadata.uid for owner in owners):
        return ""
    if (metadata.get("labels") or {}).get(names.SPECULATOR) == seen.name:
        return ""
    mark = f"{names.SPECULATOR}={seen.name}"
    return f"is not ours; rename the AdaptiveSpeculator, or hand the object over with the label {mark}"


def _status(key: Key, kind: str, name: str, status: dict[str, Any]) -> Manifest:
    return {
        "apiVersion": KINDS[kind].prefix.removeprefix("/apis/"),
        "kind": kind,
        "metadata": {"name": name, "namespace": key.namespace},
        "status": status,
    }

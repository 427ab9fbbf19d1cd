"""Observe, plan, apply: the same path for every speculator, whatever event triggered it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from updraft_chassis.clock import Clock
from updraft_chassis.errors import Conflict, Forbidden, InvalidInput, NotFound, UpdraftError
from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport, DraftImportStatus
from updraft_operator.api.draft_version import DraftVersion, DraftVersionStatus
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.accounts import audience
from updraft_operator.manifests.gpus import num_devices
from updraft_operator.manifests.manifest import Manifest, OperatorConfig
from updraft_operator.manifests.redis import Place
from updraft_operator.manifests.redis_users import Role, password_of
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import Tls, overdue_s
from updraft_operator.metrics import Metrics
from updraft_operator.planning import imports, versions
from updraft_operator.planning.assessment import unreadable
from updraft_operator.planning.objects import Key, Ref
from updraft_operator.planning.observed import Observed, Refusal, moment
from updraft_operator.planning.plan import Event, Plan, hash_of, make_plan, make_refresh, ref, written
from updraft_operator.planning.pods import Selection
from updraft_operator.planning.policy import policy
from updraft_operator.planning.registry_calls import RegistryCall
from updraft_operator.planning.traces.places import pointed, reachable, servers_of, tls_servers
from updraft_operator.registry_connections import RegistryAddress, RegistryConnections
from updraft_operator.upgrade_turns import UpgradeTurns
from updraft_operator.watching.attached_pods import AttachedPods
from updraft_operator.watching.certificates import Certificates
from updraft_operator.watching.cluster import CERTIFICATE, Cluster
from updraft_operator.watching.redis_servers import DedicatedRedis, RedisServers, WantedUsers
from updraft_operator.watching.secrets import Secrets, SecretsSnapshot, fresh_passwords
from updraft_operator.watching.store import CachedObjects, Store, Unreadable
from updraft_operator.watching.traces import delete_traces
from updraft_operator.writes import event_content, foreign, is_owned, refused, status_content, steps

logger = logging.getLogger(__name__)

_NEXT_S, _MOST_NEXT_S = 0.1, 60.0
"""After writes that make others possible. Their own events tell nothing new, so nothing else brings the next plan. Doubled each
time, because a write that somebody undoes is never the last."""


class Again(NamedTuple):
    """When to look at a speculator again without an event."""

    after_s: float
    needs_plan: bool
    """False if only its status is due."""


@dataclass(slots=True)
class _ReconcileState:
    """State kept per speculator between reconciliations. Losing it is harmless."""

    refusals: dict[Ref, Refusal] = field(default_factory=dict)
    tries_again: bool = False
    """Whether its next plan tries refused writes again. Until then, its status says that they are refused."""
    settled: dict[Ref, tuple[str, str]] = field(default_factory=dict)
    status_due_s: float = float("-inf")
    ending_s: float | None = None
    """When its deletion was first observed."""
    next_s: float = _NEXT_S
    logged_steps: frozenset[str] = frozenset()
    """Steps that the last dry run logged."""
    fresh_passwords: dict[tuple[Place, Role], str] = field(default_factory=fresh_passwords)
    """For Secrets without one. A password stays the same until it is written, because pod templates depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    store: Store
    cluster: Cluster
    secrets: Secrets
    attached: AttachedPods
    registries: RegistryConnections
    users: RedisServers
    certificates: Certificates
    turns: UpgradeTurns
    metrics: Metrics
    clock: Clock
    config: OperatorConfig
    redis_url: str
    registry_address: str
    """Template, with {name} and {namespace}."""
    dedicated: DedicatedRedis | None = None
    """None if speculators may have no Redis of their own."""
    status_s: float = 30.0
    """Minimum time between two status writes that change only measurements."""
    cleanup_s: float = 60.0
    """How long a deletion may wait for data outside the cluster."""
    is_dry_run: bool = False
    guard: Callable[[], None] = lambda: None
    """Raises if this process may not write."""


class Reconciler:
    """Stateless except for refused writes, which are not repeated on every reconciliation."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._states: dict[Key, _ReconcileState] = {}

    async def reconcile(self, key: Key) -> Again | None:
        """Reconcile once. Returns when to look again, or None to wait for an event."""
        try:
            return await self._reconcile(key)
        except Exception as error:
            self._wiring.turns.cannot_say(key)
            if isinstance(error, Unreadable):
                await self._report_unreadable(key, error)
            raise

    async def _reconcile(self, key: Key) -> Again | None:
        cached = self._wiring.store.cached(key)
        if cached.speculator is None:
            self._forget(key)
            await self._report_orphans(key, cached)
            return None
        observed = self._tried_again(key, await self.observe(key, cached))
        plan = self._plan(key, observed)
        if self._wiring.is_dry_run:
            self._log_plan(key, plan)
            return None
        for step in (self._prepare, self._apply_plan):
            if await step(key, observed, plan):
                cached = self._wiring.store.cached(key)
                if cached.speculator is None:  # deleted in the meantime
                    self._forget(key)
                    return None
                observed = await self.observe(key, cached)
                plan = self._plan(key, observed)
        if plan.users is not None:
            self._wiring.users.want(key, WantedUsers.of(observed, plan))
        await self._publish(key, observed, plan)
        self._measure(key, observed)
        return self._next(key, plan)

    def _next(self, key: Key, plan: Plan) -> Again | None:
        state = self._state(key)
        if not (plan.apply or plan.certificates):
            state.next_s = _NEXT_S
            return _again(plan)
        after_s, state.next_s = state.next_s, min(2 * state.next_s, _MOST_NEXT_S)
        return Again(after_s, needs_plan=True)

    def _measure(self, key: Key, observed: Observed) -> None:
        self._wiring.metrics.show(key, observed.speculator.status.conditions)
        self._wiring.metrics.show_pods(key, observed.pods_of(names.SERVING))
        if observed.config.tls.is_on:
            held = (observed.certificates.get(part) for part in tls_servers(observed))
            self._wiring.metrics.show_certificate(key, min(map(overdue_s, held)))

    async def refresh(self, key: Key) -> Again | None:
        """Write what changed in the statuses, without a plan. A resource that was never reconciled here gets one."""
        if key not in self._states or self._wiring.is_dry_run:
            return await self.reconcile(key)
        cached = self._wiring.store.cached(key)
        if cached.speculator is None:
            return None
        attached = await self._wiring.attached.read(key, cached.speculator)
        if cached.speculator.spec.serving.is_attached:
            cached = self._wiring.store.cached(key)  # it may have changed meanwhile
        if cached.speculator is None:
            return None
        observed, clock = self._observed(key, cached, self._wiring.secrets.last(key), attached), self._wiring.clock
        plan = make_refresh(observed, now_unix_s=clock.now(), now_s=clock.monotonic())
        await self._publish(key, observed, plan)
        self._wiring.metrics.show(key, observed.speculator.status.conditions)
        return _again(plan)

    def look_again(self) -> None:
        """With its next plan, each speculator reads its Secrets again, and tries refused writes again: a quota may have grown,
        or a conflicting object be gone."""
        self._wiring.secrets.expire()
        for state in self._states.values():
            state.tries_again = True

    def _tried_again(self, key: Key, observed: Observed) -> Observed:
        """Without the former refusals, if it is time. They stay as long as Secrets or pods cannot be read."""
        state = self._state(key)
        if state.tries_again:
            state.tries_again = False
            state.refusals.clear()
        return replace(observed, refusals=tuple(state.refusals.values()))

    async def observe(self, key: Key, cached: CachedObjects) -> Observed:
        assert cached.speculator is not None
        attached = await self._wiring.attached.read(key, cached.speculator)
        requests = (child for target, child in cached.children.items() if target.kind == CERTIFICATE)
        version, traces = ",".join(sorted(child.resource_version for child in requests)), cached.speculator.spec.traces
        in_use = pointed(key.name, cached.children, attached.pods) if traces.enabled else frozenset()
        is_known, own = bool(self._dedicated_url(key)), self._wiring.config.tls
        parts = servers_of(cached.speculator, own, cached.children, has_dedicated=is_known)
        secrets = await self._wiring.secrets.read(key, cached.speculator, version, in_use, parts)
        return self._observed(key, cached, secrets, attached)

    def _observed(self, key: Key, cached: CachedObjects, secrets: SecretsSnapshot, attached: Selection) -> Observed:
        wiring, state = self._wiring, self._state(key)
        assert cached.speculator is not None
        state.settled = {target: result for target, result in state.settled.items() if target in cached.children}
        if cached.speculator.metadata.deletion_timestamp is not None and state.ending_s is None:
            state.ending_s = wiring.clock.monotonic()
        held = {Place.SHARED: secrets.redis_urls, Place.DEDICATED: secrets.dedicated_urls}
        for (place, role), new in fresh_passwords().items():
            if password_of(held[place].get(role, "")) == state.fresh_passwords[place, role]:
                state.fresh_passwords[place, role] = new
        last = cached.children.get(Ref("ConfigMap", tls.ca_name(key.name)))
        config = wiring.certificates.trusted(wiring.config, secrets.certificates, last)
        self._connect(key, cached, cached.speculator, config.tls)
        return Observed(
            speculator=cached.speculator,
            config=config,
            children=cached.children,
            pods=(*cached.pods, *attached.states),
            attached=attached,
            drafts=cached.drafts,
            imports=cached.imports,
            registry=wiring.registries.view(key),
            redis_url=wiring.redis_url,
            redis_urls=secrets.redis_urls,
            certificates=secrets.certificates,
            dedicated_url=reachable(self._dedicated_url(key), key.name, cached.children),
            dedicated_urls=secrets.dedicated_urls,
            rotations=secrets.rotations,
            right_users=wiring.users.right(key),
            ready_places=wiring.users.ready_places(key),
            unread=wiring.users.unread(key),
            is_preview=wiring.is_dry_run,
            fresh_passwords=dict(state.fresh_passwords),
            users_problem=wiring.users.problem(key),
            redis_max_memory=wiring.users.max_memory(key),
            has_turn=wiring.turns.has_turn(key),
            upgrades_stopped_by=wiring.turns.stops(key),
            missing_secrets=secrets.missing,
            refusals=tuple(state.refusals.values()),
            settled=dict(state.settled),
            status_due_s=state.status_due_s,
            ending_s=state.ending_s,
            cleanup_s=wiring.cleanup_s,
        )

    def _dedicated_url(self, key: Key) -> str:
        return "" if self._wiring.dedicated is None else self._wiring.dedicated.url(key)

    def _connect(self, key: Key, cached: CachedObjects, owner: AdaptiveSpeculator, trusted: Tls) -> None:
        """Connect to the registry while its pod is ready, and never without TLS where there should be TLS."""
        workload = cached.children.get(Ref("StatefulSet", names.child(key.name, names.REGISTRY)))
        is_ready = workload is not None and workload.status.get("readyReplicas", 0) > 0
        if not is_ready or owner.metadata.deletion_timestamp is not None:
            self._wiring.registries.set_address(key, None)
            return
        if trusted.is_on and not trusted.authorities:  # a connection with those that were known goes on
            return
        address = self._wiring.registry_address.format(name=key.name, namespace=key.namespace)
        lists_pods = owner.spec.serving.is_attached or num_devices(owner.spec) > 0
        found = RegistryAddress(address=address, audience=audience(*key), lists_pods=lists_pods)
        if trusted.is_on:
            found = replace(found, host=tls.registry_host(owner), authorities=trusted.authorities)
        self._wiring.registries.set_address(key, found)

    def _plan(self, key: Key, observed: Observed) -> Plan:
        self._wiring.metrics.plans.inc()
        plan = make_plan(observed, now_unix_s=self._wiring.clock.now(), now_s=self._wiring.clock.monotonic())
        if observed.speculator.metadata.deletion_timestamp is not None:
            self._wiring.turns.leave(key)
        elif plan.upgrade is None:
            self._wiring.turns.cannot_say(key)
        else:
            self._wiring.turns.report(key, plan.upgrade)
        return plan

    def _log_plan(self, key: Key, plan: Plan) -> None:
        state, found = self._state(key), steps(plan)
        for step in sorted(found - state.logged_steps):
            logger.info("Would %s", step, extra={"speculator": str(key)})
        state.logged_steps = found

    async def _prepare(self, key: Key, observed: Observed, plan: Plan) -> bool:
        """Sign certificates and apply the CAs, for which other changes wait. Returns whether anything was done."""
        cas = [new for new in plan.apply if ref(new) == Ref("ConfigMap", tls.ca_name(key.name))]
        for order in plan.certificates:
            data = self._wiring.certificates.sign(order)
            await self._apply(key, observed, tls.secret(observed.speculator, order, data))
        for content in cas:
            await self._apply(key, observed, content)
        return bool(plan.certificates or cas)

    async def _apply_plan(self, key: Key, observed: Observed, plan: Plan) -> bool:
        """Objects, then calls, then the finalizer. Returns whether anything was done."""
        for content in plan.apply:
            await self._apply(key, observed, content)
        for target in plan.delete:
            logger.info("Deleting object", extra={"speculator": str(key), "object": "/".join(target)})
            uid, version = observed.identity(target)
            await self._wiring.cluster.delete(target.kind, key.namespace, target.name, uid)
            if target.kind != "Pod":  # it runs until the watch says that it is gone
                self._wiring.store.drop(target.kind, key, target.name, version)
        for call in plan.calls:
            await self._call(key, observed, call)
        if plan.cleans_up:
            self._wiring.guard()
            url = self._wiring.certificates.redis_url(self._wiring.redis_url)
            await delete_traces(self._wiring.secrets, url, observed.speculator, observed.config)
        if plan.finalizer:
            await self._set_finalizer(key, observed, has_it=plan.finalizer == "add")
        return bool(plan.apply or plan.delete or plan.calls or plan.finalizer)

    async def _apply(self, key: Key, observed: Observed, content: Manifest) -> None:
        wiring, state, target = self._wiring, self._state(key), ref(content)
        mark = "" if target.kind in ("Secret", "DraftVersion", "DraftImport") else hash_of(content)
        try:
            await self._check_owner(observed, target)
            cached = observed.children.get(target)
            answer = await wiring.cluster.apply(content)
        except (InvalidInput, Conflict, Forbidden) as error:
            state.refusals[target] = refused(target, mark, error)
            facts = {"speculator": str(key), "object": "/".join(target), "error": str(error)}
            logger.warning("Apply refused", extra=facts)
            return
        state.refusals.pop(target, None)
        version = answer["metadata"]["resourceVersion"]
        if target.kind == "Secret":
            wiring.secrets.forget(key)
            return
        wiring.store.put(target.kind, answer)
        turn = content["metadata"].get("annotations", {}).get(names.TURN)
        if turn is not None and (cached is None or turn != cached.turn):
            wiring.turns.began(key)
        if mark:
            state.settled[target] = (mark, version)
        if cached is not None and cached.applied == mark and cached.resource_version != version:
            wiring.metrics.drift.labels(target.kind).inc()
            logger.info("Reverted drift", extra={"speculator": str(key), "object": "/".join(target)})

    async def _check_owner(self, observed: Observed, target: Ref) -> None:
        """Conflict if the object exists and belongs to someone else: it is never taken over silently."""
        cached = observed.children.get(target)
        owner, metadata = observed.speculator.metadata, {}
        if cached is not None:
            if cached.owner_uid in ("", owner.uid) or target.kind == "Job":
                return
            metadata = cached.live()["metadata"]
        else:
            try:
                metadata = (await self._wiring.cluster.get(target.kind, owner.namespace, target.name))["metadata"]
            except NotFound:
                return
        if problem := foreign(metadata, observed):
            raise Conflict(f"{target.kind} {target.name} already exists and {problem}")

    async def _call(self, key: Key, observed: Observed, call: RegistryCall) -> None:
        rollout = policy(observed.speculator.spec.rollout)
        self._wiring.guard()
        try:
            await self._wiring.registries.call(key, call, rollout)
        except (InvalidInput, Conflict, NotFound) as error:
            refusal = Refusal(ref=call.ref, digest=call.digest, reason="InvalidRollout", message=str(error))
            self._state(key).refusals[call.ref] = refusal
            facts = {"speculator": str(key), "call": call.verb, "error": str(error)}
            logger.warning("Registry call refused", extra=facts)
            return
        self._state(key).refusals.pop(call.ref, None)
        logger.info("Called the registry", extra={"speculator": str(key), "call": call.verb, "version": call.version})

    async def _set_finalizer(self, key: Key, observed: Observed, *, has_it: bool) -> None:
        metadata = observed.speculator.metadata
        others = [name for name in metadata.finalizers if name != names.FINALIZER]
        finalizers = [*others, names.FINALIZER] if has_it else others
        patch = {"metadata": {"finalizers": finalizers, "resourceVersion": metadata.resource_version}}
        try:
            answer = await self._wiring.cluster.merge("AdaptiveSpeculator", key.namespace, key.name, patch)
        except NotFound:
            return
        self._wiring.store.put("AdaptiveSpeculator", answer)

    async def _publish(self, key: Key, observed: Observed, plan: Plan) -> None:
        """Write statuses and Events; objects that are gone are skipped."""
        drafts: tuple[DraftVersion | DraftImport, ...] = (*observed.drafts, *observed.imports)
        seen = {Ref(type(each).__name__, each.metadata.name): each.metadata.resource_version for each in drafts}
        statuses = [(target, seen[target], status) for target, status in plan.draft_statuses]
        if plan.status is not None:
            own = Ref("AdaptiveSpeculator", key.name)
            statuses.insert(0, (own, observed.speculator.metadata.resource_version, plan.status))
            self._state(key).status_due_s = self._wiring.clock.monotonic() + self._wiring.status_s
        gone = {target for target, seen, status in statuses if not await self._write_status(key, target, seen, status)}
        for event in plan.events:
            if (event.kind, event.name) not in gone:
                await self._emit(key, event)

    async def _write_status(self, key: Key, target: Ref, seen: str, status: dict[str, Any]) -> bool:
        """Whether the object still exists. Unavailable if it is not the `seen` resource version any more."""
        if self._wiring.is_dry_run:
            return True
        try:
            answer = await self._wiring.cluster.apply(status_content(key, target, seen, status), is_status=True)
        except NotFound:
            return False
        self._wiring.store.put(target.kind, answer)
        return True

    async def _report_unreadable(self, key: Key, error: Unreadable) -> None:
        """Say in the status of an object that nothing follows from it: what it said before is no longer looked after."""
        content = self._wiring.store.content(key, error.ref)
        new = unreadable(content, str(error), moment(self._wiring.clock.now()))
        if new != content.get("status"):
            await self._write_status(key, error.ref, content["metadata"]["resourceVersion"], new)

    async def _report_orphans(self, key: Key, cached: CachedObjects) -> None:
        """Say in the status of drafts that their AdaptiveSpeculator does not exist. Those that it owned are deleted with it."""
        now = moment(self._wiring.clock.now())
        found: list[tuple[DraftVersion | DraftImport, DraftVersionStatus | DraftImportStatus | None]] = []
        found += [(orphan, versions.orphaned(orphan, now)) for orphan in cached.drafts]
        found += [(orphan, imports.orphaned(orphan, now)) for orphan in cached.imports]
        new = [
            (Ref(type(one).__name__, one.metadata.name), one, status) for one, status in found if status != one.status
        ]
        due = [each for each in new if not is_owned(self._wiring.store.content(key, each[0]))]
        for target, orphan, status in due:
            if status is not None:
                await self._write_status(key, target, orphan.metadata.resource_version, written(status))

    async def _emit(self, key: Key, event: Event) -> None:
        """Create an Event. A failure is logged, because no work depends on Events."""
        content = event_content(key, event, self._wiring.clock.now())
        try:
            await self._wiring.cluster.create(content)
        except UpdraftError as error:
            facts = {"speculator": str(key), "reason": event.reason, "error": str(error)}
            logger.info("Event not created", extra=facts)

    def _forget(self, key: Key) -> None:
        self._wiring.registries.set_address(key, None)
        self._wiring.secrets.forget(key)
        self._wiring.attached.forget(key)
        self._wiring.users.forget(key)
        self._wiring.metrics.forget(key)
        self._wiring.turns.forget(key)
        self._states.pop(key, None)

    def _state(self, key: Key) -> _ReconcileState:
        return self._states.setdefault(key, _ReconcileState())


def _again(plan: Plan) -> Again | None:
    return None if plan.again_s is None else Again(plan.again_s, needs_plan=plan.needs_plan or plan.is_moving)

"""A small world around one speculator: an API server and a registry in memory, and the real reconciler between them.

What kubelets, people and the registry do is done by hand; what the operator does about it is its own code.
"""

from collections.abc import Coroutine
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

from prometheus_client import CollectorRegistry
from tests.support.clock import ManualClock
from tests.support.manifests import CONFIG
from tests.support.observed import version
from tests.unit.operator.memory_cluster import MemoryCluster, Where

from updraft.registry.v1 import registry_pb2 as pb
from updraft_chassis.errors import Conflict, NotFound, Unavailable
from updraft_operator.api import names
from updraft_operator.manifests.manifest import Manifest, OperatorConfig
from updraft_operator.manifests.redis_users import RedisUser
from updraft_operator.manifests.tls.terms import OwnSecrets
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import ConnectionState, Observed, RegistryView
from updraft_operator.planning.plan import Plan, make_plan
from updraft_operator.planning.policy import policy
from updraft_operator.planning.registry_calls import RegistryCall, RegistryVerb
from updraft_operator.reconcile import Reconciler, Wiring
from updraft_operator.registry_connections import RegistryAddress, RegistryConnections
from updraft_operator.upgrade_turns import UpgradeTurns
from updraft_operator.watching.attached_pods import AttachedPods
from updraft_operator.watching.certificates import Certificates
from updraft_operator.watching.cluster import KINDS
from updraft_operator.watching.redis_servers import DedicatedRedis, RedisServers, Url
from updraft_operator.watching.redis_users import RedisUsers
from updraft_operator.watching.secrets import Secrets
from updraft_operator.watching.store import Store, key_of
from updraft_rollouts.policy import RolloutPolicy

T = TypeVar("T")

KEY = Key("team", "qwen")
OWNER: Where = ("AdaptiveSpeculator", KEY.namespace, KEY.name)
CONDEMNED = (pb.PHASE_REJECTED, pb.PHASE_ROLLED_BACK, pb.PHASE_FAILED)
WAITING = (pb.PHASE_PENDING, pb.PHASE_HELD, pb.PHASE_CANARY)
_MOST_LOOKS = 8
_RESYNC_S = 60.0


class FakeRegistry:
    """Versions and wishes, without gates: phases change when a test says so, or when it is told to."""

    def __init__(self) -> None:
        self.versions: dict[int, pb.Version] = {}
        self.pinned: int | None = None
        self.is_paused = False
        self.policy = RolloutPolicy().to_proto()
        self.latest = 0
        self.is_away = False
        self.calls: list[RegistryCall] = []
        self.traffic: dict[int, pb.VersionTraffic] = {}

    def state(self) -> pb.SpeculatorState:
        """As a stream would tell it."""
        stable = self._with(pb.PHASE_STABLE)
        state = pb.SpeculatorState(
            speculator=KEY.name,
            stable=stable,
            candidate=self._with(pb.PHASE_CANARY),
            latest=self.latest,
            paused=self.is_paused,
            policy=self.policy,
            pods=pb.Pods(connected=2, serving_stable=2 if stable else 0),
            traffic=[self.traffic[number] for number in sorted(self.traffic)],
        )
        if self.pinned is not None:
            state.pinned = self.pinned
        return state

    def publish(self, **more: Any) -> int:
        """A new version, waiting."""
        self.latest += 1
        self.versions[self.latest] = version(self.latest, pb.PHASE_PENDING, **more)
        return self.latest

    def move(self, number: int, phase: "pb.Phase.ValueType") -> None:
        """Another phase; there is one stable version and one candidate."""
        for each in self.versions.values():
            if phase in (pb.PHASE_STABLE, pb.PHASE_CANARY) and each.phase == phase:
                each.phase = pb.PHASE_SUPERSEDED if phase == pb.PHASE_STABLE else pb.PHASE_HELD
        self.versions[number].phase = phase

    def call(self, call: RegistryCall, desired: pb.RolloutPolicy) -> None:
        """As the real one answers."""
        if self.is_away:
            raise Unavailable("no answer")
        self.calls.append(call)
        if call.version:
            self._on_version(call)
        elif call.verb is RegistryVerb.SET_POLICY:
            self.policy = RolloutPolicy.from_proto(desired, RolloutPolicy()).to_proto()
        elif call.verb in (RegistryVerb.PIN, RegistryVerb.UNPIN):
            self.pinned = 0 if call.verb is RegistryVerb.PIN else None
        else:
            self.is_paused = call.verb is RegistryVerb.PAUSE

    def _on_version(self, call: RegistryCall) -> None:
        kept = self.versions.get(call.version)
        if kept is None:
            raise NotFound(f"there is no version {call.version}")
        if call.verb in (RegistryVerb.RETAIN, RegistryVerb.RELEASE):
            kept.retain = call.verb is RegistryVerb.RETAIN
            return
        if kept.phase in CONDEMNED:
            raise Conflict(f"version {call.version} is never served again")
        self.pinned = call.version if call.verb is RegistryVerb.PIN else self.pinned
        self.move(call.version, pb.PHASE_STABLE)

    def _with(self, phase: "pb.Phase.ValueType") -> int:
        return max((number for number, each in self.versions.items() if each.phase == phase), default=0)


class FakeRegistries:
    """A stream that is opened at one look, and has said the newest by the next, while the registry is there."""

    def __init__(self, registry: FakeRegistry) -> None:
        self._registry = registry
        self._address: RegistryAddress | None = None
        self._is_new = False
        self._last = RegistryView(connection=ConnectionState.CONNECTING)

    def set_address(self, _key: Key, address: RegistryAddress | None) -> None:
        former = self._address
        self._address = address
        if former is None or address is None or replace(address, authorities=former.authorities) != former:
            self._last = RegistryView(connection=ConnectionState.CONNECTING)
            self._is_new = address != former

    def view(self, _key: Key) -> RegistryView:
        if self._address is None:
            return RegistryView()
        if self._is_new:  # the answer is still on its way
            self._is_new = False
            return self._last
        if self._registry.is_away:
            return RegistryView(
                connection=ConnectionState.UNREACHABLE,
                problem="no answer",
                state=self._last.state,
                versions=self._last.versions,
            )
        kept = tuple(deepcopy(each) for each in self._registry.versions.values())
        self._last = RegistryView(connection=ConnectionState.CONNECTED, state=self._registry.state(), versions=kept)
        return self._last

    async def call(self, _key: Key, call: RegistryCall, desired: pb.RolloutPolicy) -> None:
        self._registry.call(call, desired)


@dataclass(slots=True)
class Streams:
    """Traces that wait in each Redis, by a part of its address; those that are away answer nothing."""

    unread: dict[str, int] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    """Addresses at which streams were to be deleted."""


class AnsweringRedis(RedisUsers):
    """A Redis that has the users as soon as they are wanted. Its own work is asked in tests/integration."""

    def __init__(self, url: Url, *, streams: Streams, **more: Any) -> None:
        super().__init__(url, **more)
        self._streams = streams

    @property
    def _host(self) -> str:
        """Empty while its address is not known."""
        try:
            return self._url().rpartition("@")[2].partition("?")[0]
        except Unavailable:
            return ""

    def want(
        self,
        key: Key,
        users: tuple[RedisUser, ...],
        *,
        is_moving: bool = False,
        drains: str = "",
        leaves: str = "",
    ) -> None:
        super().want(key, users, is_moving=is_moving, drains=drains, leaves=leaves)
        if leaves and not users and self._host not in self._streams.left:
            if num_unread := self._streams.unread.get(self._host, 0):
                self._unread[key] = num_unread
            else:
                self._streams.left.append(self._host)
        if drains and not self._is_away:
            self._unread[key] = self._streams.unread.get(self._host, 0)

    @property
    def _is_away(self) -> bool:
        return self._host in {"", *self._streams.away}

    def right(self, key: Key) -> frozenset[RedisUser]:
        return frozenset(self._wanted.get(key, ())) if not self._is_away else frozenset()

    def are_right(self, key: Key) -> bool:
        users = self._wanted.get(key, ())
        return not self._is_away and bool(users) and all(user.password_hash for user in users)


class World:
    """All of it."""

    def __init__(self, config: OperatorConfig = CONFIG) -> None:
        self.config = config
        self.cluster, self.registry, self.clock = MemoryCluster(), FakeRegistry(), ManualClock()
        self.store, self.streams = Store(), Streams()
        self.cluster.watchers.append(self._watch)
        self.restart()
        spec = {"targetModel": {"uri": "/models/tiny"}}
        self.cluster.set(
            {"kind": OWNER[0], "metadata": {"name": KEY.name, "namespace": KEY.namespace}, "spec": spec, "status": {}}
        )

    def restart(self) -> None:
        """Another operator: all that it knows is what it lists."""
        self.store = Store()
        for (kind, _, _), each in self.cluster.objects.items():
            if kind in KINDS:
                self.store.put(kind, each)
        self.metrics = Metrics(CollectorRegistry())
        make_users = partial(
            AnsweringRedis,
            installation=CONFIG.installation,
            period_s=5.0,
            may_write=lambda: True,
            is_gone=lambda key: not self.store.has(key),
            notify=lambda _: None,
            metrics=self.metrics,
            streams=self.streams,
        )
        self.certificates = Certificates(
            self.cluster,
            self.config,
            OwnSecrets(namespace=self.config.namespace, authority="updraft-ca"),
            self.clock,
            may_write=lambda: True,
            on_change=lambda: None,
        )
        self.turns = UpgradeTurns(self.config.max_upgrades, self.store.speculators, lambda _: None, self.metrics)
        self.secrets, self._expired_s = Secrets(self.cluster, self.clock), self.clock.monotonic()
        self.users = RedisServers(make_users, lambda: "redis://:secret@own")
        self.reconciler = Reconciler(
            Wiring(
                store=self.store,
                cluster=self.cluster,
                secrets=self.secrets,
                attached=AttachedPods(self.cluster, self.clock),
                registries=cast("RegistryConnections", FakeRegistries(self.registry)),
                users=self.users,
                turns=self.turns,
                certificates=self.certificates,
                metrics=self.metrics,
                clock=self.clock,
                config=replace(self.config, has_dedicated_redis=True),
                dedicated=DedicatedRedis(
                    key=b"k" * 32, address="{name}-redis.{namespace}.svc:6379", has_tls=self.config.tls.is_on
                ),
                redis_url="redis://:secret@own",
                registry_address="{name}-registry.{namespace}.svc:50051",
            )
        )

    def settle(self) -> int:
        """Look until two looks change nothing, for the first may only open a stream; how many it took."""
        if self.clock.monotonic() - self._expired_s > _RESYNC_S:
            self._expired_s = self.clock.monotonic()
            self.secrets.expire()
        num_quiet = 0
        for number in range(1, _MOST_LOOKS + 1):
            before = (len(self.cluster.writes), len(self.registry.calls))
            run_now(self.reconciler.reconcile(KEY))
            is_quiet = before == (len(self.cluster.writes), len(self.registry.calls))
            num_quiet = num_quiet + 1 if is_quiet else 0
            if num_quiet == 2:
                return number
        raise AssertionError(f"still writing after {_MOST_LOOKS} looks: {self.cluster.writes[-5:]}")

    def observe(self) -> Observed | None:
        """What the operator sees now; None if the resource is gone."""
        known = self.store.cached(KEY)
        return None if known.speculator is None else run_now(self.reconciler.observe(KEY, known))

    @property
    def num_plans(self) -> int:
        """Plans that the reconciler has made."""
        return int(self.metrics.plans._value.get())

    def plan(self) -> Plan:
        """What the operator would do now."""
        observation = self.observe()
        if observation is None:
            return Plan()
        return make_plan(observation, now_unix_s=self.clock.now(), now_s=self.clock.monotonic())

    def spec(self, **more: Any) -> None:
        """Somebody changes the spec; parts are merged in."""
        self.cluster.edit(OWNER, lambda body: body.update(spec=_merged(body["spec"], more)))

    def pod(self, part: str, number: int, status: Manifest | None) -> None:
        """A kubelet says how it stands with a pod; None: it is gone."""
        own = names.child(KEY.name, part)
        is_ordered = ("StatefulSet", KEY.namespace, own) in self.cluster.objects
        where = ("Pod", KEY.namespace, f"{own}-{number}" if is_ordered else f"{own}-7f9c8d5b6-{number}")
        if status is not None:
            metadata = {"name": where[2], "namespace": where[1], "labels": names.labels(KEY.name, part)}
            uid = self.cluster.objects.get(where, {"metadata": {}})["metadata"].get("uid", where[2])
            self.cluster.set({"kind": "Pod", "metadata": {**metadata, "uid": uid}, "status": status})
        elif where in self.cluster.objects:
            self.cluster.remove(where)

    def starts_registry(self, *, is_ready: bool = True) -> None:
        """Its StatefulSet says whether its pod is ready."""
        where = ("StatefulSet", KEY.namespace, names.child(KEY.name, names.REGISTRY))
        if where in self.cluster.objects:
            self.cluster.edit(where, lambda body: body.update(status={"readyReplicas": int(is_ready)}))

    def drafts(self) -> dict[str, Manifest]:
        """All DraftVersions by name."""
        return {each["metadata"]["name"]: each for each in self.cluster.of("DraftVersion")}

    def desired(self) -> pb.RolloutPolicy:
        """The policy that the spec asks for."""
        owner = self.store.cached(KEY).speculator
        assert owner is not None
        return policy(owner.spec.rollout)

    def _watch(self, kind: str, body: Manifest, is_deleted: bool) -> None:  # noqa: FBT001 - a Watcher
        if kind not in KINDS:
            return
        key = key_of(kind, body)
        if is_deleted and key is not None:
            self.store.drop(kind, key, body["metadata"]["name"], body["metadata"]["resourceVersion"])
        elif not is_deleted:
            self.store.put(kind, body)


def run_now(work: Coroutine[Any, Any, T]) -> T:
    """Run what waits for nothing: everything in this world answers at once."""
    try:
        work.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    work.close()
    raise AssertionError("something waits in a world where all is there")


def _merged(old: Manifest, new: Manifest) -> Manifest:
    result = deepcopy(old)
    for name, value in new.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            result[name] = _merged(result.get(name) or {}, value)
        else:
            result[name] = value
    return result

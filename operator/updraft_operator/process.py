"""The operator process: builds every part once, and shuts them down in reverse order."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from updraft_chassis import lifecycle, logs, metrics
from updraft_chassis.clock import Clock, SystemClock
from updraft_chassis.credentials import token_in
from updraft_chassis.errors import NotFound, UpdraftError
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.tls.terms import TlsMode
from updraft_operator.metrics import Metrics
from updraft_operator.planning.objects import Key
from updraft_operator.reconcile import Reconciler, Wiring
from updraft_operator.registry_connections import RegistryConnections
from updraft_operator.settings import OperatorSettings
from updraft_operator.upgrade_turns import UpgradeTurns
from updraft_operator.watching.attached_pods import AttachedPods
from updraft_operator.watching.certificates import Certificates
from updraft_operator.watching.cluster import CERTIFICATE, LEADER_WORKER_SET, OURS, Cluster
from updraft_operator.watching.handlers import Watches
from updraft_operator.watching.kubernetes_cluster import TIMEOUT_S, KubernetesCluster, connected
from updraft_operator.watching.leader import TRUST, AlwaysLeader, Lease, LeaseName
from updraft_operator.watching.redis_servers import DedicatedRedis, RedisServers
from updraft_operator.watching.redis_users import RedisUsers
from updraft_operator.watching.resync import FIRST_S, Resync
from updraft_operator.watching.secrets import Secrets, redis_key
from updraft_operator.watching.store import Store
from updraft_operator.watching.work_queue import WorkQueue
from updraft_operator.watching.x509 import own_context

logger = logging.getLogger(__name__)

PROCESS = "updraft-operator"

_CRD_WAIT_S = 5.0
_FIRST_RETRY_S = 0.5
_STANDBY_S = 0.2

_FROZEN_RESYNCS = 3
"""Consecutive failed resyncs after which the process counts as stuck."""


def run(settings: OperatorSettings) -> None:
    logs.configure(process="operator", level=settings.log_level, format=settings.log_format)
    for noisy in ("kopf", "kubernetes", "aiohttp"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)  # it warns that it does not handle signals
    lifecycle.run(PROCESS, partial(serve, settings))


async def serve(settings: OperatorSettings, stop: lifecycle.Stop) -> None:
    """Watch, and work while leading, until `stop`."""
    clock, collectors = SystemClock(), CollectorRegistry()
    measures = Metrics(collectors)
    async with AsyncExitStack() as stack:
        store, work = Store(), WorkQueue(clock.monotonic)
        lease_cluster = await stack.enter_async_context(connected())
        forget = list[Callable[[], None]]()
        lease = _lease(settings, lease_cluster, clock, partial(_on_change, store, work, measures, forget))
        cluster = await stack.enter_async_context(
            connected(lease.check, lambda *labels: measures.writes.labels(*labels).inc(), write_s=_write_s(settings))
        )
        resync = Resync(store, cluster, clock, measures, settings.namespaces)
        port = stack.enter_context(
            metrics.serve(
                collectors,
                host=settings.host,
                port=settings.metrics_port,
                ready=lambda: resync.synced_s is not None,
                alive=_alive(resync, settings.resync_seconds),
                setting="UPDRAFT_OPERATOR_METRICS_PORT",
                token=token_in(settings.metrics_token_file).get if settings.metrics_token_file is not None else None,
                tls=own_context(PROCESS, clock.now()) if settings.config.tls.is_on_for_metrics else None,
            )
        )
        measures.watch_age.set_function(lambda: resync.agreed_age_s)
        measures.queue.set_function(lambda: len(work))
        measures.speculators.set_function(lambda: len(store.speculators()))
        logger.info("Starting operator", extra={"metrics_port": port, "namespaces": settings.watch_namespaces or "all"})
        served = await _until_served(cluster, settings, stop)
        if served is None:
            return
        config, kinds = served
        resync.begin(kinds)
        dedicated = _dedicated(settings)
        find_key = partial(read_key, dedicated, cluster, settings)
        await find_key()

        async with asyncio.TaskGroup() as tasks:
            request_token = partial(cluster.token, settings.namespace, settings.service_account)
            registries = RegistryConnections(
                tasks,
                request_token,
                clock,
                work.add,
                on_measurement=work.add_measured,
                measured_s=settings.status_seconds,
            )
            measures.connections.set_function(lambda: registries.num_connected)
            make_users = partial(
                RedisUsers,
                installation=config.installation,
                period_s=settings.redis_users_seconds,
                may_write=lambda: lease.is_held and resync.synced_s is not None and not settings.dry_run,
                is_gone=lambda key: _is_watched(key, settings.namespaces) and not store.has(key),
                notify=work.add,
                metrics=measures,
            )
            certificates = Certificates(
                cluster,
                config,
                settings.own_secrets,
                clock,
                may_write=lambda: lease.is_held and not settings.dry_run,
                on_change=lambda: _add_all(store, work),
            )
            shared_url = settings.redis_url.get_secret_value()
            users = RedisServers(make_users, partial(certificates.redis_url, shared_url) if shared_url else None)
            measures.overdue.set_function(
                lambda: measures.num_overdue(clock.now()) + (certificates.redis_overdue_s <= clock.now())
            )
            turns = UpgradeTurns(settings.upgrades_max_concurrent, store.speculators, work.add, measures)
            forget += [users.start_over, certificates.start_over, turns.start_over]
            wiring = Wiring(
                store=store,
                cluster=cluster,
                secrets=Secrets(cluster, clock),
                attached=AttachedPods(cluster, clock),
                registries=registries,
                users=users,
                certificates=certificates,
                turns=turns,
                metrics=measures,
                clock=clock,
                config=config,
                redis_url=settings.redis_url.get_secret_value(),
                registry_address=settings.registry_address,
                dedicated=dedicated,
                status_s=settings.status_seconds,
                cleanup_s=settings.cleanup_seconds,
                is_dry_run=settings.dry_run,
                guard=lease.check,
            )
            watches = Watches(store, work.add, work.add_measured, settings.namespaces, kinds)
            machinery = _Machinery(work=work, resync=resync, lease=lease, watches=watches, find_key=find_key)
            await _work(tasks, settings, wiring, machinery, stop)


def _lease(
    settings: OperatorSettings, cluster: KubernetesCluster, clock: Clock, on_change: Callable[[bool], None]
) -> Lease | AlwaysLeader:
    if not settings.leader_election:
        on_change(True)  # noqa: FBT003 - it leads
        return AlwaysLeader()
    named = {"namespace": settings.namespace, "name": settings.lease_name, "identity": settings.identity}
    return Lease(cluster, LeaseName(**named, seconds=settings.lease_seconds), clock, on_change)


def _on_change(
    store: Store,
    work: WorkQueue,
    measures: Metrics,
    forget: Iterable[Callable[[], None]],
    is_leader: bool,  # noqa: FBT001 - what changed
) -> None:
    """Leadership was won or lost: `forget` what only a leader learns."""
    measures.leader.set(is_leader)
    for each in forget:
        each()
    if is_leader:
        _add_all(store, work)


def _add_all(store: Store, work: WorkQueue) -> None:
    for key in store.all_keys():
        work.add(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machinery:
    work: WorkQueue
    resync: Resync
    lease: Lease | AlwaysLeader
    watches: Watches
    find_key: Callable[[], Awaitable[None]]


async def _work(
    tasks: asyncio.TaskGroup, settings: OperatorSettings, wiring: Wiring, machinery: _Machinery, stop: lifecycle.Stop
) -> None:
    """Watch and reconcile until `stop`; then stop in order: the workers, the Lease, the watches."""
    reconciler, lease, watches = Reconciler(wiring), machinery.lease, machinery.watches
    watching = tasks.create_task(watches.run())
    background = [tasks.create_task(_resync(machinery, wiring.store, reconciler, settings.resync_seconds))]
    workers = (_worker(machinery, reconciler, wiring.metrics) for _ in range(settings.workers))
    background += map(tasks.create_task, workers)
    own = [tasks.create_task(wiring.users.run())]
    own += [tasks.create_task(wiring.certificates.run())] if wiring.config.tls.is_on else []
    stop_leading = lifecycle.Stop()
    leading = tasks.create_task(lease.run(stop_leading))
    await stop.wait()
    for task in background:
        task.cancel()
    wiring.registries.close()
    wiring.users.close()
    wiring.certificates.close()
    await asyncio.wait([*background, *own])
    stop_leading.request()
    await leading
    watches.end()
    await watching


class _Known(NamedTuple):
    """The answers of the cluster that the work begins with."""

    config: OperatorConfig
    """With the issuer, the installation and what is served."""
    kinds: tuple[str, ...]
    """Those to watch."""


async def _until_served(cluster: KubernetesCluster, settings: OperatorSettings, stop: lifecycle.Stop) -> _Known | None:
    """Wait for what the cluster has to say first, because the operator may start before its CRDs are installed, or while the
    API server is busy. None after `stop`."""
    last_reason = ""
    while not stop.requested:
        try:
            return await _known_of(cluster, settings)
        except UpdraftError as error:
            reason = str(error)
        if reason != last_reason:
            last_reason = reason
            logger.warning("Waiting for the cluster", extra={"reason": reason})
        await stop.wait(_CRD_WAIT_S)
    return None


async def _known_of(cluster: KubernetesCluster, settings: OperatorSettings) -> _Known:
    for kind in OURS:
        await _served(cluster, kind, (settings.namespaces or ("",))[0])
    requests_certificates = settings.tls_mode is TlsMode.CERT_MANAGER
    kinds = await cluster.kinds(has_certificates=requests_certificates)
    if requests_certificates and CERTIFICATE not in kinds:
        raise NotFound("UPDRAFT_OPERATOR_TLS_MODE is CertManager, and the cluster does not serve cert-manager.io/v1")
    config = replace(
        settings.config,
        issuer=await cluster.issuer(),
        installation=await cluster.uid(settings.namespace),
        has_leader_worker_sets=LEADER_WORKER_SET in kinds,
    )
    return _Known(config, kinds)


def _dedicated(settings: OperatorSettings) -> DedicatedRedis | None:
    has_tls = settings.tls_mode is not TlsMode.DISABLED
    return DedicatedRedis(address=settings.redis_address, has_tls=has_tls) if settings.redis_key_secret else None


async def read_key(dedicated: DedicatedRedis | None, cluster: Cluster, settings: OperatorSettings) -> None:
    """Read or make the key of dedicated Redis, if there is none yet. Without it, only their resources are left as they are."""
    if dedicated is None or dedicated.key:
        return
    name, is_dry_run = settings.redis_key_secret, settings.dry_run
    try:
        dedicated.key = await redis_key(cluster, settings.namespace, name, may_write=not is_dry_run)
    except UpdraftError as error:
        if is_dry_run and isinstance(error, NotFound):  # so there is no such Redis yet
            dedicated.key = secrets.token_bytes(32)
            return
        logger.warning("Dedicated Redis are not available; will retry", extra={"reason": str(error)})


async def _served(cluster: KubernetesCluster, kind: str, namespace: str) -> None:
    try:
        await cluster.metadata(kind, namespace)
    except NotFound as error:
        raise NotFound("the CustomResourceDefinitions of updraft.dev are not installed") from error


def _is_watched(key: Key, namespaces: tuple[str, ...]) -> bool:
    return not namespaces or key.namespace in namespaces


def _alive(resync: Resync, period_s: float) -> Callable[[], bool]:
    """False once no resync has completed for long, or several in a row found changes that the watches missed."""
    limit_s = _FROZEN_RESYNCS * period_s + min(FIRST_S, period_s)
    return lambda: resync.age_s < limit_s and resync.num_missed < _FROZEN_RESYNCS


def _write_s(settings: OperatorSettings) -> float:
    """Timeout of a write: the part of the Lease that remains when this process stops trusting it."""
    return max(1.0, (1 - TRUST) * settings.lease_seconds) if settings.leader_election else TIMEOUT_S


async def _resync(machinery: _Machinery, store: Store, reconciler: Reconciler, period_s: float) -> None:
    """Compare the cache with a full listing periodically; the first time once the watches have caught up."""
    resync, work = machinery.resync, machinery.work
    while True:
        is_first = resync.synced_s is None
        try:
            await resync.run_once(work.add)
        except UpdraftError as error:
            logger.warning("Resync failed", extra={"error": str(error)})
            await asyncio.sleep(_FIRST_RETRY_S if resync.synced_s is None else _CRD_WAIT_S)
            continue
        await machinery.find_key()
        reconciler.look_again()
        if is_first:  # nothing has a plan yet, and turns of upgrades wait for one of each
            _add_all(store, work)
        else:
            work.add_spread(store.all_keys(), period_s / 2)
        await asyncio.sleep(period_s)


async def _worker(machinery: _Machinery, reconciler: Reconciler, measures: Metrics) -> None:
    work, lease, resync = machinery.work, machinery.lease, machinery.resync
    while True:
        key, waited_s = await work.take()
        try:
            if lease.is_held and resync.synced_s is not None:
                measures.delay.observe(waited_s)
                await _reconcile(key, work, reconciler, measures)
            elif lease.is_held:
                work.add_after(key, _STANDBY_S)
        finally:
            work.done(key)


async def _reconcile(key: Key, work: WorkQueue, reconciler: Reconciler, measures: Metrics) -> None:
    started_s, result = time.monotonic(), "failed"
    try:
        needs_plan = work.take_need_of_plan(key)
        again = await (reconciler.reconcile(key) if needs_plan else reconciler.refresh(key))
        result = "done" if needs_plan else "measured"
        work.forget(key)
        if again is not None:
            work.add_after(key, again.after_s, needs_plan=again.needs_plan)
    except UpdraftError as error:
        measures.errors.labels(type(error).__name__).inc()
        logger.warning("Reconcile failed; will retry", extra={"speculator": str(key), "error": str(error)})
        work.retry(key, getattr(error, "retry_after_s", None) or 0.0)
    except Exception:  # a bug that one resource triggers must not stop the work on the others
        measures.errors.labels("bug").inc()
        logger.exception("Reconcile failed with an unexpected error", extra={"speculator": str(key)})
        work.retry(key)
    measures.reconcile.labels(result).observe(time.monotonic() - started_s)
